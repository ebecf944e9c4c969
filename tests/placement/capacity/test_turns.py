"""Routers at shards, played through: against closed forms, and what must hold whatever the routers send."""

from __future__ import annotations

import numpy as np
import pytest

from placement.capacity.hardware import Constants, ModelShape
from placement.capacity.turns import MAX_MERGED_ROWS, Turn, Visit, call_seconds, layer_seconds

MODEL = ModelShape(hidden_size=10, intermediate_size=4, weight_bytes=1.0, activation_bytes=1.0)  # 120 B, 240 flops
READS = Constants(120.0, 1e15, 0.0, 0.0, 0.0)  # a second for each expert
ONE_EXPERT = Visit(0, 1, 1, 0b1)


def routers(count: int, layers: int, visits: tuple[Visit, ...] = (ONE_EXPERT,), before_s: float = 0.0):
    return [[Turn(before_s, visits, 0.0)] * layers for _ in range(count)]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_what_waits_for_one_layer_is_computed_together(count):
    # A request is computed while all others wait; they are the next call.
    seconds_IL = layer_seconds(routers(count, 1), MODEL, READS, np.ones(1))
    assert seconds_IL == pytest.approx(np.full((count, 1), min(count, 2)))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_without_room_for_others_rows_routers_take_turns(count):
    seconds_IL = layer_seconds(routers(count, 1), MODEL, READS, np.ones(1), max_merged_rows=1)
    assert seconds_IL == pytest.approx(np.full((count, 1), count))


def test_requests_for_different_layers_are_not_merged():
    # Two routers that are a layer apart stay so, since they take turns.
    seed = next(seed for seed in range(100) if len(set(np.random.default_rng(seed).integers(2, size=2))) == 2)
    seconds_IL = layer_seconds(routers(2, 2), MODEL, READS, np.ones(1), seed=seed)
    assert seconds_IL == pytest.approx(np.full((2, 2), 2))


def test_experts_of_a_call_are_read_once_and_different_ones_each():
    # Three routers that want different experts: one is computed for a second, then the two others for two.
    unlike = [[Turn(0.0, (Visit(0, 1, 1, 1 << router),), 0.0)] for router in range(3)]
    assert layer_seconds(unlike, MODEL, READS, np.ones(1)) == pytest.approx(np.full((3, 1), 3))


def test_a_router_waits_for_its_slowest_shard():
    both = (Visit(0, 1, 1, 0b1), Visit(1, 1, 1, 0b10))
    seconds_IL = layer_seconds([[Turn(0.25, both, 0.5)]], MODEL, READS, np.array([1.0, 0.25]))
    assert seconds_IL.tolist() == [[0.25 + 4 + 0.5]]


def test_no_layer_is_quicker_than_alone_and_none_waits_for_more_than_all_others():
    rng = np.random.default_rng(0)
    constants = Constants(1e3, 1e4, 0.01, 0.0, 0.0, row_s=0.001, overlap=0.3)
    turns_IL, alone_IL, most_IL = [], np.zeros((4, 6)), np.zeros((4, 6))
    for router in range(4):
        turns_IL.append([])
        for layer in range(6):
            visits = []
            for rank in np.flatnonzero(rng.random(3) < 0.7).tolist():
                experts = int(rng.integers(1, 256))
                rows = int(rng.integers(1, 9))
                visits.append(Visit(rank, rows, 2 * rows, experts))
            turn = Turn(float(rng.random()) / 50, tuple(visits), float(rng.random()) / 50)
            turns_IL[router].append(turn)
            calls = [call_seconds(v.rows, v.pairs, v.experts.bit_count(), MODEL, constants) for v in visits]
            alone_IL[router, layer] = turn.before_s + max(calls, default=0.0) + turn.after_s
    longest = call_seconds(4 * 8, 4 * 16, 8, MODEL, constants)
    most_IL = alone_IL + 4 * longest
    for seed in range(3):
        seconds_IL = layer_seconds(turns_IL, MODEL, constants, np.ones(3), seed=seed)
        assert (seconds_IL >= alone_IL - 1e-12).all()
        assert (seconds_IL <= most_IL).all()


def test_shards_merge_as_many_rows_as_is_assumed_here():
    compiled = pytest.importorskip("experts.shard.compiled")
    assert compiled.MAX_MERGED_ROWS == MAX_MERGED_ROWS
