"""What a step costs on given hardware, and whether the split pays. It plans no placement."""
