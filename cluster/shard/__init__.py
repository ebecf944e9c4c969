"""The shard deployment: how a shard joins the cluster, shows that it lives, and leaves. What a shard does is
`experts.shard`."""
