"""Counters of routers and shards as series for Prometheus and Ray. The endpoints that show them are `cluster.console`;
the counting itself is in `experts`."""
