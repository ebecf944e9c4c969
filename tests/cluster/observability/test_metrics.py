"""Both ways out of the counters against made-up statuses: the /metrics text, and what Ray's metrics agent is given."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.observability import metrics
from cluster.observability.metrics import PREFIX, RouterMetrics, render
from tests.support.serve.statuses import controller_status, migration_view, router_status, seat_view

COUNTERS = {
    "steps": 10,
    "dispatches": 40,
    "rows": 80,
    "visits": 120,
    "failovers": 1,
    "fallback_pairs": 2,
    "fallback_seconds": 0.0025,
    "refused_requests": 6,
    "no_slot_pairs": 5,
    "sent_bytes": 1000,
    "received_bytes": 900,
}
# Series that are named by convention, with the field of a status and how many of its units one of theirs is.
FIELDS = {
    "visits": ("fan_out_sum", 1),
    "fallback_seconds": ("fallback_ms", 1000),
    "sent_bytes": ("bytes_sent", 1),
    "received_bytes": ("bytes_received", 1),
}
SHARD_COUNTERS = {"shard_rows": [30, 50], "shard_pairs": [60, 100]}
GAUGES = {
    "epoch": 4,
    "balancedness": 0.75,
    "uncovered_pairs": 12,
    "fallback_cached_bytes": 4096,
    "swap_max_seconds": 70.5e-6,
}
UNCHANGED = ("uncovered_pairs", "fallback_cached_bytes", "swap_max_seconds")
MESH_GAUGES = {
    "controller_up": 1,
    "controller_epoch": 5,
    "ranks_missing": 1,
    "placement_target_version": 6,
    "migration_paused": 0,
    "migration_copies_in_flight": 2,
    "migration_copies_left": 9,
    "migration_left_bytes": 900_000,
    "experts_sole": 13,
    "experts_unserved": 5,
}
MESH_COUNTERS = {
    "migration_rounds": 3,
    "migration_copies": 21,
    "migration_copied_bytes": 2_100_000,
    "migration_failed_copies": 4,
}
AUTOPILOT_GAUGES = {
    "autopilot_frozen": 1,
    "autopilot_drifting_windows": 2,
    "autopilot_drift": 0.125,
    "autopilot_fan_out": 2.5,
    "autopilot_balancedness": 0.75,
    "autopilot_predicted_gain": 0.0625,
    "autopilot_measured_gain": 0.03125,
}
AUTOPILOT_COUNTERS = {
    "autopilot_reports": 14,
    "autopilot_observed_tokens": 15_000,
    "autopilot_windows": 16,
    "autopilot_plans": 5,
    "autopilot_moves": 4,
    "autopilot_undone": 1,
    "autopilot_failures": 3,
}
CONTROLLER_GAUGES, CONTROLLER_COUNTERS = MESH_GAUGES | AUTOPILOT_GAUGES, MESH_COUNTERS | AUTOPILOT_COUNTERS
SEAT_GAUGES = {"shard_slots": (0, 8), "shard_experts_held": (0, 12), "shard_experts_missing": (0, 7)}
OWN_COUNTERS = {
    "shard_requests": 40,
    "shard_failed_copies": 2,
    "shard_copy_seconds": 1.25,
    "shard_handed_out": 14,
    "shard_handed_out_bytes": 1400,
}
SOURCE_COUNTERS = {
    "shard_copies": {"process": 0, "shm": 6, "tcp": 0, "checkpoint": 1},
    "shard_copied_bytes": {"process": 0, "shm": 600, "tcp": 0, "checkpoint": 100},
}


def samples(text: bytes) -> dict[tuple[str, ...], float]:
    """Values by (name, the labels' values in the order of the labels' names)."""
    return {
        (sample.name.removeprefix(PREFIX), *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_every_counter_and_gauge_of_a_router_is_in_the_text() -> None:
    found = samples(render([router_status()], None))
    expected: dict[tuple[str, ...], float] = {(f"{name}_total", "r1"): value for name, value in COUNTERS.items()}
    expected |= {(name, "r1"): value for name, value in GAUGES.items()}
    for name, values in SHARD_COUNTERS.items():
        expected |= {(f"{name}_total", str(rank), "r1"): value for rank, value in enumerate(values)}
    expected |= {("shard_connected", "0", "r1"): 0, ("shard_connected", "1", "r1"): 1}
    expected |= {("requests_unfinished", "r1"): 3, ("controller_up",): 0}
    assert {key: value for key, value in found.items() if not key[0].startswith("dispatch_seconds")} == expected


def test_series_have_types_and_names_that_dashboards_rely_on() -> None:
    families = text_string_to_metric_families(render([router_status()], controller_status()).decode())
    types = {family.name.removeprefix(PREFIX): family.type for family in families}
    counters = [*COUNTERS, *SHARD_COUNTERS, *CONTROLLER_COUNTERS, *OWN_COUNTERS, *SOURCE_COUNTERS]
    gauges = [*GAUGES, *CONTROLLER_GAUGES, *SEAT_GAUGES, "shard_connected", "requests_unfinished"]
    assert types == {
        **dict.fromkeys(counters, "counter"),
        **dict.fromkeys([*gauges, "shard_state", "shard_loaded_bytes"], "gauge"),
        "dispatch_seconds": "histogram",
    }


def test_what_the_controller_knows_is_in_the_text() -> None:
    expected: dict[tuple[str, ...], float] = {(name,): value for name, value in CONTROLLER_GAUGES.items()}
    expected |= {(f"{name}_total",): value for name, value in CONTROLLER_COUNTERS.items()}
    expected |= {("shard_state", "0", "joining"): 1, ("shard_state", "1", "filling"): 1}
    for name, values in SEAT_GAUGES.items():
        expected |= {(name, str(rank)): value for rank, value in enumerate(values)}
    expected |= {(f"{name}_total", "1"): value for name, value in OWN_COUNTERS.items()}
    expected["shard_loaded_bytes", "1"] = 77
    for name, by_source in SOURCE_COUNTERS.items():
        expected |= {(f"{name}_total", "1", source): value for source, value in by_source.items()}
    assert samples(render([], controller_status())) == expected


@pytest.mark.parametrize("state", ["joining", "filling", "serving", "draining"])
def test_a_shard_has_one_state(state: str) -> None:
    found = samples(render([], controller_status(shards=[seat_view(3, state=state)])))
    assert [key for key in found if key[0] == "shard_state"] == [("shard_state", "3", state)]


def test_without_a_target_or_shards_the_series_of_the_mesh_are_there() -> None:
    status = controller_status(
        shards=[], routers={}, migration=migration_view(target_version=0, origin="", paused=True)
    )
    found = samples(render([], status))
    names = [*CONTROLLER_GAUGES, *(f"{name}_total" for name in CONTROLLER_COUNTERS)]
    assert found.keys() == {(name,) for name in names}
    assert (found["placement_target_version",], found["migration_paused",]) == (0, 1)


def test_series_of_the_controller_grow_with_shards_only() -> None:
    none, one, four = (
        len(samples(render([], controller_status(shards=[seat_view(rank) for rank in range(count)]))))
        for count in (0, 1, 4)
    )
    assert four - none == 4 * (one - none)
    assert one - none <= 20


def test_histograms_are_cumulated_and_in_seconds() -> None:
    found = samples(render([router_status()], None))
    for stage in ("wait", "combine"):
        assert found["dispatch_seconds_bucket", "1e-05", "r1", stage] == 1
        assert found["dispatch_seconds_bucket", "2e-05", "r1", stage] == 3
        assert found["dispatch_seconds_bucket", "5.0", "r1", stage] == 3
        assert found["dispatch_seconds_bucket", "+Inf", "r1", stage] == 4
        assert found["dispatch_seconds_count", "r1", stage] == 4
        assert found["dispatch_seconds_sum", "r1", stage] == pytest.approx(10.000035, abs=1e-9)
    assert found["dispatch_seconds_count", "r1", "plan_pack"] == 0


def test_series_grow_with_routers_and_ranks_only() -> None:
    one, three = (
        len(samples(render([router_status(name) for name in names], None))) for names in (["a"], ["a", "b", "c"])
    )
    assert three - 1 == 3 * (one - 1)
    assert one < 100


class RayMetric:
    """Stands in for Ray's Counter and Gauge; keeps what it was given, by the values of the tags."""

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name, self.tag_keys = name, tag_keys
        self.values: dict[tuple[str, ...], list[float]] = {}

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0, "Ray refuses others"
        self._note(value, tags)

    def set(self, value: float, tags: dict[str, str]) -> None:
        self._note(value, tags)

    def _note(self, value: float, tags: dict[str, str]) -> None:
        assert tuple(tags) == self.tag_keys
        self.values.setdefault(tuple(tags.values()), []).append(value)


@pytest.fixture
def ray_metrics(monkeypatch: pytest.MonkeyPatch) -> dict[str, RayMetric]:
    """Every metric made, by name without the prefix."""
    made: dict[str, RayMetric] = {}

    def make(*args: Any, **kwargs: Any) -> RayMetric:
        metric = RayMetric(*args, **kwargs)
        assert metric.name not in made
        made[metric.name.removeprefix(PREFIX)] = metric
        return metric

    monkeypatch.setattr(metrics, "ray_metrics", SimpleNamespace(Counter=make, Gauge=make))
    return made


def test_ray_gets_the_growth_of_every_counter_and_the_value_of_every_gauge(ray_metrics: dict[str, RayMetric]) -> None:
    exporter = RouterMetrics("r1")
    first = router_status()
    exporter.export(first)
    exporter.export(first)
    wait = first.stage_us.wait
    more = replace(wait, sum=wait.sum + 2e6, count=wait.count + 5)
    second = replace(
        first,
        **{
            FIELDS.get(name, (name, 1))[0]: (value + 3) * FIELDS.get(name, (name, 1))[1]
            for name, value in COUNTERS.items()
        },
        shard_rows=[30, 54],
        shard_pairs=[67, 100],
        epoch=6,
        balancedness=0.5,
        stage_us=replace(first.stage_us, wait=more),
    )
    exporter.export(second)
    exporter.export(second)
    found = {name: metric.values for name, metric in ray_metrics.items()}
    assert found == {
        **{name: {("r1",): [pytest.approx(value), pytest.approx(3)]} for name, value in COUNTERS.items()},
        "shard_rows": {("r1", "0"): [30], ("r1", "1"): [50, 4]},
        "shard_pairs": {("r1", "0"): [60, 7], ("r1", "1"): [100]},
        "epoch": {("r1",): [4, 4, 6, 6]},
        "balancedness": {("r1",): [0.75, 0.75, 0.5, 0.5]},
        **{name: {("r1",): [GAUGES[name]] * 4} for name in UNCHANGED},
        "dispatch_stage_seconds": {
            ("r1", "wait"): [pytest.approx(10.000035), pytest.approx(2.0)],
            ("r1", "combine"): [pytest.approx(10.000035)],
        },
        "dispatch_stage_count": {("r1", "wait"): [4, 5], ("r1", "combine"): [4]},
    }


def test_a_count_that_fell_is_not_exported_again_until_it_exceeds_what_was(ray_metrics: dict[str, RayMetric]) -> None:
    """Rows of a failed message are uncounted, which a counter of Ray's cannot be told."""
    exporter = RouterMetrics("r1")
    for rows in ([30, 50], [30, 45], [30, 52]):
        exporter.export(router_status(shard_rows=rows))
    assert ray_metrics["shard_rows"].values["r1", "1"] == [50, 2]
