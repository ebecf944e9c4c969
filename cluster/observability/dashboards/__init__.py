"""Grafana's dashboards as code: `python -m cluster.observability.dashboards` writes them to configs/monitoring. Which
series there are belongs to the folder above; what Prometheus alerts on to configs/monitoring/rules.yaml."""
