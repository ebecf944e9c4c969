"""Statistics of shards and routers: rates of counters, and the names that the policies read."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.autoscaling import policies
from cluster.autoscaling.measure import SHORTEST_S, EngineMeasure, Rates, ShardMeasure
from cluster.autoscaling.told import SILENT_AFTER_S, Pace, Paces, ScalingFacts, mean_pace
from cluster.config.scaling_section import ScalingSection
from experts.protocol.membership import ShardEndpoint
from experts.protocol.status import ShardStatus
from tests.support.scaling_stats import ROUTER, SHARD
from tests.support.serve.statuses import router_status

SETTINGS = ScalingSection.model_validate(
    {"slo": {"time_per_output_token_ms": 40, "time_to_first_token_ms": 900}, "shards": {"utilization": 0.5, "spare": 2}}
)
FACTS = ScalingFacts(SETTINGS, Pace(50.0, 12.0, 4.0), routers=2, experts=32, copies=2, spare_slots=1, moving=True)
ENDPOINT = ShardEndpoint(0, "i", "127.0.0.1", 1, "host", 1)


def shard_status(**counts: int) -> ShardStatus:
    """A shard with these counters."""
    values = {"loaded_experts": 40, "loaded_bytes": 400, "requests": 0, "rows": 0, "pairs": 0, "compute_ns": 0}
    return ShardStatus(
        **{"rank": 0, "epoch": 0, "pid": 1, "incarnation": "i", "endpoint": ENDPOINT, "alive": True, "fault": None},
        **{"routers": [], "kernel": "torch", "weights_digest": "", "errors": 0, "last_error": None, "last_epoch": 0},
        **{"num_slots": 23, "free_slots": 6, **values, **counts},
    )


def test_rates_are_growth_over_time_and_0_where_a_counter_began_anew() -> None:
    rates = Rates()
    assert rates.of({"a": 10.0}, 100.0) == {"a": 0.0}
    assert rates.of({"a": 30.0}, 104.0) == {"a": 5.0}
    assert rates.of({"a": 31.0}, 104.0 + SHORTEST_S / 2) == {"a": 5.0}, "too early for another"
    assert rates.of({"a": 3.0}, 106.0) == {"a": 0.0}
    assert rates.of({"a": 5.0, "b": 7.0}, 108.0) == {"a": 1.0, "b": 0.0}


def test_a_shard_says_how_busy_it_is_and_what_it_was_told() -> None:
    measure = ShardMeasure()
    measure.stats(shard_status(), FACTS, 10.0, 1e9)
    later = shard_status(compute_ns=500_000_000, requests=100, rows=800, pairs=3200)
    stats = measure.stats(later, FACTS, 12.0, 1e9 + 2)
    assert (stats["busy"], stats["layer_ms"], stats["answers_per_s"]) == (0.25, 5.0, 50.0)
    assert (stats["rows_per_s"], stats["pairs_per_s"], stats["usable_slots"]) == (400.0, 1600.0, 22.0)
    assert (stats["slo_ms"], stats["spare"], stats["copies"], stats["moving"]) == (40.0, 2.0, 2.0, 1.0)
    assert (stats["steps_per_s"], stats["step_ms"], stats["wait_ms"], stats["routers"]) == (50.0, 12.0, 4.0, 2.0)
    assert stats["empty"] == 0.0
    assert measure.stats(shard_status(loaded_experts=0), FACTS, 20.0, 1e9)["empty"] == 1.0


def test_a_router_says_its_load_and_its_pace() -> None:
    measure, status = EngineMeasure(), router_status("r1")
    measure.max_requests = 64
    measure.stats(FACTS, 10.0, 1e9)
    measure.pace(status, 10.0)
    measure.record(3, 2, 0.25)
    measure.add(between_s=[0.02, 0.04], first_s=[0.5], queue_s=[0.1])
    stats = measure.stats(FACTS, 12.0, 1e9 + 2)
    assert (stats["running"], stats["waiting"], stats["kv_cache"]) == (3.0, 2.0, 0.25)
    assert (stats["first_token_ms"], stats["queue_ms"], stats["token_ms"]) == pytest.approx((500.0, 100.0, 30.0))
    assert (stats["slo_ms"], stats["requests_each"]) == (900.0, 0.8 * 64)
    wait = status.stage_us.wait
    stages = replace(status.stage_us, wait=replace(wait, sum=wait.sum + 40_000))
    pace = measure.pace(replace(status, steps=status.steps + 10, stage_us=stages), 12.0)
    assert (pace.steps_per_s, pace.step_ms, pace.wait_ms) == pytest.approx((5.0, 30.0, 4.0))


@pytest.mark.parametrize("measured", [True, False])
def test_serve_takes_every_value_and_the_policies_find_theirs(measured: bool) -> None:
    shard = ShardMeasure().stats(shard_status(), FACTS if measured else None, 1.0, 1e9)
    engine = EngineMeasure().stats(FACTS if measured else None, 1.0, 1e9)
    for stats in (shard, engine):
        assert {type(value) for value in stats.values()} == {float}, "another type switches the statistics off"
    if measured:
        assert SHARD.keys() <= shard.keys()
        assert ROUTER.keys() <= engine.keys()
        assert shard.keys() | engine.keys() >= policies.TOLD
    else:
        assert "told_s" not in shard.keys() | engine.keys()


def test_the_pace_of_all_routers_is_the_mean_over_their_steps() -> None:
    paces = Paces()
    paces.note("a", Pace(30.0, 10.0, 2.0), 0.0)
    paces.note("b", Pace(10.0, 30.0, 6.0), 1.0)
    paces.note("idle", Pace(), 1.0)
    assert mean_pace(paces.generating(1.0)) == Pace(40.0, 15.0, 3.0)
    paces.note("b", Pace(10.0, 20.0, 4.0), SILENT_AFTER_S)
    assert mean_pace(paces.generating(SILENT_AFTER_S + 0.5)) == Pace(10.0, 20.0, 4.0), "a is silent"
    assert mean_pace([]) == Pace()
