"""Counters of routers and shards for Prometheus and Ray. Endpoints that show them are `cluster.http`."""
