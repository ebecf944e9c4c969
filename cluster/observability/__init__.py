"""Series of routers, shards and the controller for Ray's metrics agent, where Prometheus finds them, and what shows
them: the reference page, Grafana's dashboards, `make monitoring`. The counting itself is in `experts`."""
