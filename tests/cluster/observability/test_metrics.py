"""The plain /metrics text against hand-made statuses, read back by prometheus_client's own parser."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from cluster.observability.metrics import PREFIX, render
from tests.support.serve.statuses import router_status


def samples(text: bytes) -> dict[tuple[str, ...], float]:
    """Values by (name, the labels' values in the order of the labels' names)."""
    return {
        (sample.name.removeprefix(PREFIX), *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_counters_gauges_and_histograms_say_what_was_counted() -> None:
    controller = {
        "epoch": 5,
        "missing_ranks": [0],
        "shards": [{"rank": 1, "loaded_bytes": 77, "requests": 40}, {"rank": 0, "serving": False}],
    }
    found = samples(render([router_status()], controller))
    assert found["rows_total", "r1"] == 80
    assert found["epoch", "r1"] == 4
    assert found["shard_pairs_total", "1", "r1"] == 100
    assert found["shard_connected", "0", "r1"] == 0
    assert found["shard_connected", "1", "r1"] == 1
    assert found["controller_epoch",] == 5
    assert found["ranks_missing",] == 1
    assert found["shard_loaded_bytes", "1"] == 77
    assert ("shard_loaded_bytes", "0") not in found
    assert found["dispatch_seconds_bucket", "1e-05", "r1", "wait"] == 1
    assert found["dispatch_seconds_bucket", "2e-05", "r1", "wait"] == 3, "buckets are cumulated"
    assert found["dispatch_seconds_bucket", "5.0", "r1", "wait"] == 3
    assert found["dispatch_seconds_bucket", "+Inf", "r1", "wait"] == 4
    assert found["dispatch_seconds_count", "r1", "wait"] == 4
    assert abs(found["dispatch_seconds_sum", "r1", "wait"] - 10.000035) < 1e-9


def test_nothing_there_is_still_a_valid_answer() -> None:
    assert samples(render([], None))["controller_up",] == 0


def test_series_grow_with_routers_and_ranks_only() -> None:
    one, three = (
        len(samples(render([router_status()], None))),
        len(samples(render([router_status("a"), router_status("b"), router_status("c")], None))),
    )
    assert three - 1 == 3 * (one - 1)
    assert one < 60
