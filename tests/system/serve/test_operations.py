"""Health, metrics and inspection."""

from __future__ import annotations

import io
import json
import urllib.error
import urllib.request

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.serve.service import API_KEY, Service
from tests.support.waiting import wait_for


def metrics(service: Service) -> dict[str, float]:
    code, body = service.get("/expertmesh/metrics")
    assert code == 200
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals


def test_health_tells_that_tokens_came_through_the_shards(service: Service) -> None:
    code, body = service.get("/health")
    assert code == 200
    answer = json.loads(body)
    assert answer["status"] == "ok"
    [router] = answer["routers"]
    assert router["connected"] == [0, 1, 2]


def test_metrics_count_what_a_request_does(service: Service) -> None:
    before = metrics(service)
    service.greedy(16)
    after = metrics(service)

    def grown(name: str) -> float:
        return after[f"expertmesh_{name}"] - before[f"expertmesh_{name}"]

    steps, layers, top_k = grown("steps_total"), 4, 4
    assert steps >= 16
    assert grown("dispatches_total") == layers * steps
    assert grown("shard_pairs_total") == top_k * grown("rows_total"), "every expert of every row went to one shard"
    assert grown("rows_total") <= grown("shard_rows_total") == grown("visits_total")
    assert grown("dispatch_seconds_count") == 3 * grown("dispatches_total")
    assert grown("sent_bytes_total") > 0
    assert (after["expertmesh_controller_up"], after["expertmesh_ranks_missing"]) == (1, 0)
    assert after["expertmesh_epoch"] == after["expertmesh_controller_epoch"] > 0


def test_ray_exports_the_same_counters(service: Service) -> None:
    """Through Ray's metrics agent, whose port Ray writes down for Prometheus."""
    discovery = service.folder / "ray" / "prom_metrics_service_discovery.json"

    def exported() -> bool:
        if not discovery.exists():
            return False
        for target in [t for group in json.loads(discovery.read_text()) for t in group["targets"]]:
            import urllib.request

            try:
                with urllib.request.urlopen(f"http://{target}/metrics", timeout=5) as response:
                    if b"ray_expertmesh_dispatches_total" in response.read():
                        return True
            except OSError:
                continue
        return False

    service.greedy(4)
    wait_for(exported, 60, "expertmesh counters on Ray's metrics endpoint")


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
        assert shard["errors"] == 0
