"""Health, metrics and inspection."""

from __future__ import annotations

import io
import json
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from tests.support.serve.metrics_agent import totals_of
from tests.support.serve.service import API_KEY, Service
from tests.support.waiting import wait_for

SETTLED_S = 6.0  # twice what a figure takes to Ray's metrics agent


def test_health_tells_that_tokens_came_through_the_shards(service: Service) -> None:
    code, body = service.get("/health")
    assert code == 200
    answer = json.loads(body)
    assert answer["status"] == "ok"
    [router] = answer["routers"]
    assert router["connected"] == [0, 1, 2]


def test_series_count_what_a_request_does(service: Service) -> None:
    """Every process tells Ray's metrics agent its figures every second, and Ray takes them there every two."""
    names = ("steps", "dispatches", "rows", "visits", "sent_rows", "sent_pairs", "shard_rows", "shard_pairs")
    layers, top_k = 4, 4

    def figures() -> dict[str, float]:
        found = totals_of(service)
        return {name: found.get(f"ray_expertmesh_{name}_total", 0.0) for name in names}

    seen: list[tuple[float, dict[str, float]]] = []

    def settled() -> dict[str, float]:
        """Figures of one moment: those of an idle service, which stay while everybody tells them again."""
        now = figures()
        if seen and seen[-1][1] != now:
            seen.clear()
        seen.append((time.monotonic(), now))
        return now if now["steps"] > 0 and seen[-1][0] - seen[0][0] > SETTLED_S else {}

    before = wait_for(settled, 60, "figures of one moment")
    service.greedy(16)

    def counted() -> bool:
        after = figures()
        grown = {name: after[name] - before[name] for name in names}
        return (
            grown["steps"] >= 16
            and grown["dispatches"] == layers * grown["steps"]
            and grown["sent_pairs"] == grown["shard_pairs"] == top_k * grown["rows"]
            and grown["rows"] <= grown["sent_rows"] == grown["shard_rows"] == grown["visits"]
        )

    wait_for(counted, 60, "the same rows and pairs to be counted by the router and by the shards")

    def of_one_epoch() -> bool:
        found = totals_of(service)
        return found["ray_expertmesh_epoch"] == found["ray_expertmesh_controller_epoch"] > 0

    wait_for(of_one_epoch, 60, "the same epoch from the router and the controller")
    assert totals_of(service)["ray_expertmesh_ranks_missing"] == 0
    assert service.get("/expertmesh/metrics")[0] == 404, "there is one exporter"


def test_placement_says_where_each_expert_stands(service: Service) -> None:
    code, body = service.get("/expertmesh/placement")
    assert code == 200
    answer = json.loads(body)
    for layer in range(4):
        held = [expert for rank in answer["experts_of_rank"] for expert in rank[layer]]
        assert min(held.count(expert) for expert in range(32)) >= 2, "two replicas of each, on different ranks"
        assert all(len(set(rank[layer])) == len(rank[layer]) for rank in answer["experts_of_rank"])


def test_trace_is_an_archive_of_routing_decisions(service: Service) -> None:
    service.greedy(8)
    code, body = service.get("/expertmesh/trace")
    assert code == 200
    with np.load(io.BytesIO(body)) as trace:
        shapes = [trace[name].shape for name in trace.files]
    assert any(len(shape) == 3 and 4 in shape for shape in shapes), shapes
    assert service.get("/expertmesh/trace?router=nobody")[0] == 404
    forget = urllib.request.Request(f"{service.url}/expertmesh/trace", method="DELETE")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(forget, timeout=60)
    forget.add_header("Authorization", f"Bearer {API_KEY}")
    with urllib.request.urlopen(forget, timeout=60) as response:
        assert response.status == 204
    service.greedy(8)
    with np.load(io.BytesIO(service.get("/expertmesh/trace")[1])) as trace:
        assert 8 <= len(trace["topk_ids"]) < 50


def test_status_agrees_with_itself(service: Service) -> None:
    status = service.status()
    controller = status["controller"]
    assert controller["complete"]
    [router] = status["routers"]
    assert router["epoch"] == controller["epoch"]
    assert set(router["transports"].values()) == {"shm"}
    for shard in controller["shards"]:
        assert shard["routers"] == [router["router_id"]]
        # A router that heard late of an epoch may have asked for an expert that had moved; it asked elsewhere then.
        assert shard["errors"] == 0 or "has no slot on this shard" in shard["last_error"], shard["last_error"]
