"""Refresh: few moves, better balance, limits kept; what stays on its rank stays in its slot."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.placement import Placement
from placement.rule.evaluate import evaluate
from placement.search.optimizer import optimize
from placement.search.problem import PlanRequest
from placement.search.refresh import Refreshed, RefreshLimits, refresh
from placement.search.swaps.repair import keep_slots
from placement.traces.trace import ActivationTrace
from tests.support.made_up_traces import clique_trace


def skewed(seed: int, num_experts: int = 16, num_tokens: int = 500) -> ActivationTrace:
    rng = np.random.default_rng(seed)
    weight_E = rng.lognormal(0, 0.8, num_experts)
    score = np.log(weight_E) + rng.gumbel(size=(num_tokens, 2, num_experts))
    return ActivationTrace(np.argpartition(-score, 3, axis=2)[:, :, :3], num_experts)


@settings(max_examples=25)
@given(seed=st.integers(0, 100), moves=st.integers(0, 10), replicas=st.integers(1, 2), nodes=st.sampled_from([1, 2]))
def test_moves_are_bounded_and_limits_kept(seed, moves, replicas, nodes) -> None:
    window = skewed(seed, num_tokens=80)
    start = Placement.linear(2, 16, 4, nodes, replicas)
    limits = RefreshLimits(max_moves=moves, min_replicas=replicas, copy_price=0.0, proposals=200)
    after = refresh(start, window, limits).placement
    came_LER = (after.slots_LER >= 0) & (start.slots_LER < 0)
    assert (came_LER.sum((1, 2)) <= moves).all()
    on_LEN = (after.slots_LER >= 0).reshape(2, 16, nodes, -1).any(3) if nodes > 1 else after.slots_LER >= 0
    assert (on_LEN.sum(2) >= replicas).all()
    stays_LER = (after.slots_LER >= 0) & (start.slots_LER >= 0)
    assert (after.slots_LER[stays_LER] == start.slots_LER[stays_LER]).all()


def test_balance_comes_back() -> None:
    window = skewed(1, num_tokens=6000)
    start = Placement.linear(2, 16, 4)
    before = evaluate(start, window).balancedness
    found = refresh(start, window, RefreshLimits(load_cap=1.05, max_moves=8, expert_bytes=10))
    assert (before < 0.9).all()
    assert (evaluate(found.placement, window).balancedness > 0.94).all()
    assert found.gain > 5 * found.gain_error > 0
    assert found.layers == (0, 1)
    assert found.copied_bytes == 10 * found.copies > 0
    assert found.after.balancedness > found.before.balancedness


def test_a_hot_expert_gets_another_copy() -> None:
    rng = np.random.default_rng(0)
    ids = np.stack([np.zeros(400, int), rng.integers(1, 8, 400)], axis=1)[:, None]
    window = ActivationTrace(ids, 8)
    # Experts 6 and 7 stand twice without need; expert 0 alone is twice what a rank should have.
    start = Placement(4, 1, 8, np.array([[0, 1, 6, 2, 3, 7, 4, 5, -1, 6, 7, -1]]))
    after = refresh(start, window, RefreshLimits(max_moves=6)).placement
    assert after.logical_replica_count[0, 0] > 1
    assert evaluate(after, window).balancedness[0] > evaluate(start, window).balancedness[0]


def test_nothing_to_do_changes_nothing() -> None:
    trace = clique_trace(purity=1.0)
    start = Placement.linear(2, 16, 4)
    assert refresh(start, trace, RefreshLimits(max_moves=0)).placement is start


def test_a_rank_that_is_empty_stays_empty() -> None:
    row = [0, 1, 2, 3, -1, -1, -1, -1, 4, 5, 6, 7]
    start = Placement(3, 1, 8, np.array([row]))
    weight_E = np.array([8.0, 8, 8, 8, 1, 1, 1, 1])
    rng = np.random.default_rng(0)
    ids = np.stack([rng.choice(8, 2, replace=False, p=weight_E / weight_E.sum()) for _ in range(200)])[:, None]
    after = refresh(start, ActivationTrace(ids, 8), RefreshLimits(max_moves=8)).placement
    assert (after.experts_of_rank(1) == -1).all()
    assert after != start


def test_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="the window is for 2 layers of 16 experts, the placement for 2 of 8"):
        refresh(Placement.linear(2, 8, 4), clique_trace(num_tokens=10))


def test_slots_are_kept() -> None:
    old = np.array([[0, 1, 2], [3, -1, -2]], np.int32)
    new = np.array([[2, 3, 0], [1, -1, -2]], np.int32)
    assert keep_slots(old, new).tolist() == [[0, 3, 2], [1, -1, -2]]


def windows_of(trace: ActivationTrace, num_tokens: int, seed: int) -> list[ActivationTrace]:
    rng = np.random.default_rng(seed)
    return [trace.take(rng.integers(trace.num_tokens, size=num_tokens)) for _ in range(4)]


@pytest.mark.parametrize("slots", [4, 5])
def test_noise_moves_nothing(slots) -> None:
    trace = clique_trace(num_tokens=4000)
    planning, unseen = trace.split(0)
    placement = optimize(planning, PlanRequest(4, 1, slots, load_cap=1.1, effort=0.02)).placement
    for window in windows_of(unseen, 600, 1):
        assert refresh(placement, window, RefreshLimits(load_cap=1.1)).placement is placement


def test_a_shift_of_the_traffic_is_followed() -> None:
    renamed_E = np.random.default_rng(3).permutation(16)
    before = clique_trace(num_tokens=3000)
    after = ActivationTrace(renamed_E[before.topk_ids], 16)
    placement = optimize(before, PlanRequest(4, 1, 4, load_cap=1.2, effort=0.02)).placement
    fresh = optimize(after, PlanRequest(4, 1, 4, load_cap=1.2, effort=0.02)).placement
    first, last = evaluate(placement, after).fan_out.mean(), evaluate(fresh, after).fan_out.mean()
    for window in windows_of(after, 1000, 1)[:3]:
        placement = refresh(placement, window, RefreshLimits(load_cap=1.2)).placement
    assert evaluate(placement, after).fan_out.mean() < last + 0.5 * (first - last)


def test_the_best_layers_come_first() -> None:
    window = skewed(1, num_tokens=6000)
    start = Placement.linear(2, 16, 4)
    free = refresh(start, window, RefreshLimits(max_moves=8))
    few = refresh(start, window, RefreshLimits(max_moves=8, max_copies=free.copies - 1))
    assert few.copies < free.copies
    assert len(few.layers) == 1
    assert isinstance(few, Refreshed)


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_window_of_hardly_any_tokens_changes_nothing(tokens) -> None:
    start = Placement.linear(2, 16, 4)
    assert refresh(start, skewed(2, num_tokens=tokens)).placement is start
