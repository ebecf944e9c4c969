"""What a step costs on given hardware, and whether separate expert shards pay. It plans no placement."""
