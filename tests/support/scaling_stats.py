"""What a shard and a router report to Serve's autoscaler: all that the policies read."""

from __future__ import annotations

SHARD = {
    **{"told_s": 5.0, "busy": 0.2, "empty": 0.0, "usable_slots": 32.0, "experts": 32.0, "copies": 1.0, "moving": 0.0},
    **{"slo_ms": 0.0, "utilization": 0.5, "spare": 1.0, "routers": 1.0, "steps_per_s": 50.0, "step_ms": 12.0},
    **{"wait_ms": 4.0, "rows_per_s": 900.0},
}
ROUTER = {
    **{"told_s": 5.0, "running": 4.0, "waiting": 0.0, "kv_cache": 0.1, "first_tokens_per_s": 1.0, "queue_ms": 2.0},
    **{"first_token_ms": 40.0, "slo_ms": 1000.0, "requests_each": 8.0, "kv_cache_each": 0.8},
}
