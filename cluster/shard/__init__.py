"""The shard deployment: its way into the cluster and out of it. What a shard does is `experts.shard`."""
