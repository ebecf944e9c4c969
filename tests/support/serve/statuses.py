"""Made-up statuses of routers."""

from __future__ import annotations

from typing import Any

from experts.dispatch.stats import Histogram


def router_status(name: str = "r1") -> dict[str, Any]:
    """The status of a router that is connected to rank 1 of two."""
    stage = Histogram()
    for microseconds in (5, 15, 15, 10_000_000):
        stage.add(microseconds * 1000)
    return {
        "router_id": name,
        "num_ranks": 2,
        "connected": [1],
        "epoch": 4,
        "steps": 10,
        "dispatches": 40,
        "rows": 80,
        "fan_out_sum": 120,
        "failovers": 1,
        "fallback_pairs": 2,
        "bytes_sent": 1000,
        "bytes_received": 900,
        "balancedness": 0.75,
        "shard_rows": [30, 50],
        "shard_pairs": [60, 100],
        "unfinished_requests": 3,
        "stage_us": {"wait": stage.to_dict()},
    }
