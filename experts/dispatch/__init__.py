"""A router's side of a MoE layer: client, dispatcher, connections, fallback, counters. It knows neither vLLM nor Ray.
What a shard does with the rows belongs to `experts.shard`."""
