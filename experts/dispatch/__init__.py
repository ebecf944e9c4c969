"""A router's side of a MoE layer: client, dispatcher, connections, fallback, counters. It knows neither vLLM nor Ray;
what a shard does with the rows is `experts.shard`."""
