"""How many shards and routers a load needs, and that the number follows the load without swinging."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.autoscaling.policies import (
    FULL,
    HEADROOM,
    OWN_SHARE,
    RouterLoad,
    ShardLoad,
    decide,
    routers_needed,
    shards_needed,
)

MOST = 64
quick = settings(max_examples=60)
BUSY = ShardLoad(
    shards=4, busy=2.0, steps_per_s=20.0, step_ms=50.0, slo_ms=40.0, experts=128, copies=1, usable_slots=64, spare=1
)
shares = st.floats(0, 1)
shard_loads = st.builds(
    ShardLoad,
    shards=st.integers(1, 32),
    busy=st.floats(0, 32),
    balance=st.floats(0.5, 1),
    steps_per_s=st.floats(0, 500),
    routers=st.integers(1, 8),
    step_ms=st.floats(0, 500),
    wait_ms=st.floats(0, 500),
    slo_ms=st.one_of(st.just(0.0), st.floats(1, 500)),
    utilization=st.floats(0.1, 0.9),
    spare=st.integers(0, 2),
    experts=st.integers(1, 256),
    copies=st.integers(1, 3),
    usable_slots=st.integers(1, 128),
)
router_loads = st.builds(
    RouterLoad,
    routers=st.integers(1, 16),
    requests=st.floats(0, 1e4),
    kv_cache=st.floats(0, 16),
    first_token_ms=st.floats(0, 1e4),
    queue_ms=st.floats(0, 1e4),
    slo_ms=st.one_of(st.just(0.0), st.floats(1, 1e4)),
    requests_each=st.floats(1, 512),
    kv_cache_each=st.floats(0.1, 1),
)


# Shards ---------------------------------------------------------------------------------------------------------------


@quick
@given(shard_loads)
def test_the_shards_asked_for_are_enough_for_every_reason(load: ShardLoad) -> None:
    count, _ = shards_needed(load, MOST)
    assert count >= load.copies
    assert count * load.usable_slots >= load.experts * load.copies, "room for what the placement wants"
    left = count - load.spare
    assert left * load.usable_slots >= load.experts, "after a loss every expert has a slot"
    busiest = load.busy / load.balance
    assert busiest <= count * load.utilization + 1e-5
    assert busiest <= left * FULL + 1e-5, "after a loss the others keep up"


@quick
@given(shard_loads)
def test_one_shard_fewer_would_be_too_few(load: ShardLoad) -> None:
    """An oracle by trying: each count below breaks one of the rules."""
    count, _ = shards_needed(load, MOST)
    now_ms = load.part_ms(load.shards)
    rest_ms = load.step_ms - (min(now_ms, load.wait_ms) if load.wait_ms else now_ms)
    allowed_ms = max(load.slo_ms - rest_ms, OWN_SHARE * load.slo_ms)
    fewer = count - 1
    assert fewer < 1 or any(
        (
            fewer * load.usable_slots < load.experts * load.copies,
            (fewer - load.spare) * load.usable_slots < load.experts,
            fewer < load.copies,
            load.busy / load.balance > fewer * load.utilization,
            load.busy / load.balance > (fewer - load.spare) * FULL,
            load.slo_ms > 0 < load.step_ms and load.part_ms(fewer) > allowed_ms,
        )
    )


@quick
@given(shard_loads, st.floats(1, 4))
def test_more_load_never_asks_for_fewer_shards(load: ShardLoad, factor: float) -> None:
    assert shards_needed(load.grown(factor), MOST)[0] >= shards_needed(load, MOST)[0]


@quick
@given(shard_loads, st.floats(0, 300))
def test_a_slower_step_never_asks_for_fewer_shards(load: ShardLoad, more_ms: float) -> None:
    slower = replace(load, step_ms=load.step_ms + more_ms)
    assert shards_needed(slower, MOST)[0] >= shards_needed(load, MOST)[0]


@quick
@given(shard_loads, st.floats(0.1, 1))
def test_a_stricter_slo_never_asks_for_fewer_shards(load: ShardLoad, factor: float) -> None:
    stricter = replace(load, slo_ms=load.slo_ms * factor)
    assert stricter.slo_ms == 0 or shards_needed(stricter, MOST)[0] >= shards_needed(load, MOST)[0]


def test_the_slo_is_met_by_the_predicted_step() -> None:
    """Four shards compute 25 ms of a 50 ms step; in 40 ms the rest leaves 15, which takes seven."""
    assert BUSY.part_ms(4) == 25.0
    assert shards_needed(BUSY, MOST) == (7, "40 ms a token")
    assert 25 + BUSY.part_ms(7) <= 40 < 25 + BUSY.part_ms(6)


def test_where_all_else_takes_longer_than_the_slo_shards_are_not_started_without_end() -> None:
    """They get a tenth of the SLO, 4 ms: 25 shards rather than the most there may be."""
    slow = replace(BUSY, step_ms=500.0)
    count, _ = shards_needed(slow, MOST)
    assert count == 25
    assert BUSY.part_ms(25) == pytest.approx(4.0)


def test_what_waiting_for_shards_did_not_take_is_not_theirs() -> None:
    """Shared experts run meanwhile: of 25 ms of computing the step waits for 10."""
    assert shards_needed(replace(BUSY, wait_ms=10.0), MOST)[0] > shards_needed(BUSY, MOST)[0]


def test_other_routers_queue_before_a_shard() -> None:
    assert replace(BUSY, routers=4).part_ms(4) > BUSY.part_ms(4)


def test_without_load_what_has_to_be_held_counts() -> None:
    idle = ShardLoad(shards=4, busy=0.0, slo_ms=40.0, experts=128, usable_slots=44, copies=1, spare=1)
    assert shards_needed(idle, MOST) == (4, "1 copies of 128 experts")
    assert shards_needed(replace(idle, spare=0), MOST)[0] == 3
    assert shards_needed(replace(idle, copies=2), MOST)[0] == 6


# Routers --------------------------------------------------------------------------------------------------------------


@quick
@given(router_loads)
def test_the_routers_asked_for_are_enough_for_every_reason(load: RouterLoad) -> None:
    count, _ = routers_needed(load)
    assert (count == 0) == (load.requests == 0)
    if load.requests:
        assert load.requests <= count * load.requests_each + 1e-3
        assert load.kv_cache <= count * load.kv_cache_each + 1e-3


@quick
@given(router_loads, st.floats(1, 4))
def test_more_load_never_asks_for_fewer_routers(load: RouterLoad, factor: float) -> None:
    assert routers_needed(load.grown(factor))[0] >= routers_needed(load)[0]


def test_only_waiting_counts_as_time_to_the_first_token() -> None:
    long_prompts = RouterLoad(routers=2, requests=2, first_token_ms=5000.0, queue_ms=0.0, slo_ms=1000.0)
    assert routers_needed(long_prompts)[0] == 1, "no router makes a prompt shorter"
    queued = replace(long_prompts, first_token_ms=2000.0, queue_ms=1500.0)
    assert routers_needed(queued) == (6, "1000 ms to the first token"), "1,500 ms of two routers in 500"


# The decision ---------------------------------------------------------------------------------------------------------


@quick
@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50), st.booleans())
def test_up_as_far_as_needed_and_down_by_one(now: int, needed: int, more: int, settled: bool) -> None:
    wanted = decide(now, needed, max(needed, more), settled)
    assert wanted == needed or now - 1 <= wanted <= now
    assert wanted >= min(now, needed)
    if not settled:
        assert wanted >= now, "while anything changes nothing goes"


@quick
@given(shard_loads, st.integers(1, 40), st.lists(st.floats(0.95, 1.05), min_size=4, max_size=40))
def test_a_load_that_wavers_by_a_twentieth_never_turns_the_number_round_twice(
    load: ShardLoad, now: int, noise: list[float]
) -> None:
    """HEADROOM is wider than the noise: after the first way down there is no way up."""
    assert HEADROOM > 1.05 / 0.95
    load = replace(load, slo_ms=0.0)  # noise on a step time at its SLO is the delays' business
    moves = []
    for factor in noise:
        noisy = replace(load, busy=load.busy * factor)
        wanted = decide(now, shards_needed(noisy, MOST)[0], shards_needed(noisy.grown(HEADROOM), MOST)[0], True)
        if wanted != now:
            moves.append(wanted > now)
        now = wanted
    assert sum(a != b for a, b in pairwise(moves)) <= 1


class Service:
    """A closed loop: each stream asks for its next token when it has one, so a faster step brings more load."""

    def __init__(self, streams: float, ms_a_stream: float, rest_ms: float, slo_ms: float) -> None:
        self.streams, self.ms_a_stream, self.rest_ms, self.slo_ms = streams, ms_a_stream, rest_ms, slo_ms

    def load(self, shards: int) -> ShardLoad:
        part_ms = self.streams * self.ms_a_stream / shards
        step_ms = self.rest_ms + part_ms
        return ShardLoad(
            shards=shards,
            busy=shards * part_ms / step_ms,
            steps_per_s=1e3 / step_ms,
            step_ms=step_ms,
            wait_ms=part_ms,
            slo_ms=self.slo_ms,
            experts=32,
            usable_slots=32,
        )

    def settle(self, now: int, decisions: int = 90) -> list[int]:
        """The number of shards after each decision."""
        seen = []
        for _ in range(decisions):
            load = self.load(now)
            now = decide(now, shards_needed(load, MOST)[0], shards_needed(load.grown(HEADROOM), MOST)[0], True)
            now = min(max(now, 1), MOST)
            seen.append(now)
        return seen


@quick
@given(st.floats(1, 256), st.floats(0.05, 1), st.floats(2, 30), st.floats(20, 100), st.integers(1, MOST))
def test_in_a_closed_loop_the_number_comes_to_rest_with_the_slo_met(
    streams: float, ms_a_stream: float, rest_ms: float, over_ms: float, start: int
) -> None:
    service = Service(streams, ms_a_stream, rest_ms, rest_ms + over_ms)
    seen = service.settle(start)
    assert seen[-1] == seen[-20], "it rests"
    turns = [b - a for a, b in pairwise(seen) if a != b]
    assert all(step > 0 for step in turns) or all(step < 0 for step in turns), "and went one way"
    assert seen[-1] == MOST or service.load(seen[-1]).step_ms <= service.slo_ms + 1e-6


def test_a_load_that_comes_and_goes_brings_shards_and_takes_them_away() -> None:
    calm, rush = Service(2, 0.5, 10, 30), Service(100, 0.5, 10, 30)
    [few, *_] = reversed(calm.settle(2))
    up = rush.settle(few)
    assert up[0] > few, "at once"
    assert up[-1] >= math.ceil(100 * 0.5 / 20)
    down = calm.settle(up[-1])
    assert down[0] == up[-1] - 1, "one at a time"
    assert down[-1] == few
