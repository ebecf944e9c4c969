"""The planner: limits hold whatever is asked, one call gives one plan, and it is good where the best is known."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from placement.placement import Placement
from placement.policy import greedy_placement
from placement.rule.evaluate import evaluate
from placement.search.optimizer import optimize
from placement.search.problem import PlanRequest
from placement.search.replica_budget import spread_replicas
from placement.traces.trace import ActivationTrace
from tests.support.made_up_traces import clique_trace

SMALL = 0.01  # effort: enough for sixteen experts


def test_cliques_are_found() -> None:
    trace = clique_trace(purity=1.0)
    result = optimize(trace, PlanRequest(4, 1, 4, load_cap=1.5, effort=SMALL))
    assert result.fan_out.tolist() == [1.0, 1.0]
    result = optimize(trace, PlanRequest(4, 2, 4, load_cap=1.5, effort=SMALL))
    assert result.node_fan_out.tolist() == [1.0, 1.0]


def test_a_plan_predicts_what_the_evaluator_finds() -> None:
    trace = clique_trace()
    for nodes, slots, near in ((1, 4, False), (2, 4, False), (2, 4, True), (2, 5, True)):
        result = optimize(trace, PlanRequest(4, nodes, slots, load_cap=1.2, prefer_local_replicas=near, effort=SMALL))
        evaluation = evaluate(result.placement, trace, near)
        if near:
            np.testing.assert_allclose(result.far_fan_out, evaluation.far_fan_out)
        np.testing.assert_allclose(result.fan_out, evaluation.fan_out)
        np.testing.assert_allclose(result.node_fan_out, evaluation.node_fan_out)
        np.testing.assert_allclose(result.balancedness, evaluation.balancedness)


@pytest.mark.parametrize("objective", ["fan_out", "balance"])
def test_a_layer_that_no_token_went_through_is_planned_too(objective: str) -> None:
    """As that for guesses, if no router guessed: it has its experts, and for fan-out they stay where they are."""
    trace = clique_trace()
    counts_LE = np.concatenate([trace.set_load(), np.zeros((1, trace.num_experts), np.int64)])
    ids_TLK = np.concatenate([trace.topk_ids, np.full_like(trace.topk_ids[:, :1], -1)], 1)
    wider = ActivationTrace(ids_TLK, trace.num_experts, counts=counts_LE)
    current = Placement.linear(3, trace.num_experts, 4, 1, 1)
    for moved_from in (None, current):
        request = PlanRequest(4, 1, 5, load_cap=1.2, effort=SMALL, objective=objective)
        result = optimize(wider, request, moved_from)
        assert (result.placement.logical_replica_count >= 1).all()
        assert (result.fan_out[2], result.balancedness[2]) == (0.0, 1.0)
    if objective == "fan_out":
        before, after = (
            each.physical_to_logical_map[2].reshape(4, -1).tolist() for each in (current, result.placement)
        )
        assert all(set(old) - {-1} <= set(new) for old, new in zip(before, after, strict=True))


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 1000),
    num_nodes=st.sampled_from([1, 2]),
    ranks_per_node=st.integers(1, 3),
    num_experts=st.integers(4, 14),
    spare=st.integers(0, 3),
    min_replicas=st.integers(1, 2),
    uneven=st.booleans(),
    objective=st.sampled_from(["fan_out", "balance"]),
)
def test_limits_hold(seed, num_nodes, ranks_per_node, num_experts, spare, min_replicas, uneven, objective) -> None:
    rng = np.random.default_rng(seed)
    num_ranks = num_nodes * ranks_per_node
    slots_R = np.full(num_ranks, -(-num_experts * min_replicas // num_ranks) + spare)
    if uneven and num_ranks > 1 and num_nodes == 1:
        slots_R[0] += 2
        slots_R[-1] -= min(1, spare)
    ids = np.stack([np.stack([rng.permutation(num_experts)[:3] for _ in range(2)]) for _ in range(60)])
    trace = ActivationTrace(ids, num_experts)
    try:
        request = PlanRequest(
            num_ranks, num_nodes, tuple(slots_R.tolist()), min_replicas=min_replicas, objective=objective, effort=0.001
        )
        request.check_experts(num_experts)
    except ValueError:
        reject()  # impossible
    placement = optimize(trace, request).placement
    map_LRs = placement.physical_to_logical_map.reshape(2, num_ranks, -1)
    assert ((map_LRs >= 0).sum(2) <= slots_R).all()
    holds_LER = placement.slots_LER >= 0
    if objective == "fan_out":
        assert (holds_LER.sum(2) == placement.logical_replica_count).all(), "an expert stands twice on a rank"
    on_LED = holds_LER if num_nodes == 1 else holds_LER.reshape(2, num_experts, num_nodes, -1).any(3)
    assert (on_LED.sum(2) >= min_replicas).all()


@pytest.mark.parametrize("request_of", [
    lambda seed: PlanRequest(4, 1, 4, seed=seed, effort=SMALL),
    lambda seed: PlanRequest(4, 2, 5, seed=seed, effort=SMALL),
    lambda seed: PlanRequest(4, 1, 5, seed=seed, effort=SMALL),
    lambda seed: PlanRequest(4, 2, 5, prefer_local_replicas=True, seed=seed, effort=SMALL),
])  # fmt: skip
def test_the_same_call_gives_the_same_plan(request_of) -> None:
    trace = clique_trace()
    assert optimize(trace, request_of(3)).placement == optimize(trace, request_of(3)).placement


def test_numbering_of_experts_does_not_matter() -> None:
    trace = clique_trace()
    new_id_E = np.random.default_rng(5).permutation(16)
    renamed = ActivationTrace(new_id_E[trace.topk_ids], 16)
    for request in (PlanRequest(4, 1, 4, effort=SMALL), PlanRequest(4, 2, 5, effort=SMALL)):
        one, other = optimize(trace, request), optimize(renamed, request)
        np.testing.assert_allclose(one.fan_out, other.fan_out)
        np.testing.assert_allclose(one.balancedness, other.balancedness)


@pytest.mark.parametrize(("slots", "nodes"), [(4, 1), (4, 2), (5, 1), (5, 2)])
def test_never_worse_than_what_it_starts_from(slots, nodes) -> None:
    trace = clique_trace()
    request = PlanRequest(4, nodes, slots, load_cap=1.3, effort=0.0001)
    good = optimize(trace, PlanRequest(4, nodes, slots, load_cap=1.3, effort=0.05)).placement
    again = optimize(trace, request, current=good)
    ours, greedy = evaluate(again.placement, trace), evaluate(greedy_placement(trace, request), trace)
    start = evaluate(good, trace)

    def cost(found):
        return (found.fan_out + (4 * found.node_fan_out if nodes > 1 else 0)).mean()

    assert cost(ours) <= cost(start) + 1e-9
    assert cost(ours) <= cost(greedy) + 1e-9


def test_planned_for_near_replicas_first_less_comes_from_afar() -> None:
    # Half of the tokens want clique 0, the others one of two: a rank a clique, the hot one on both nodes.
    rng = np.random.default_rng(0)
    clique_T = np.where(rng.random(600) < 0.5, 0, rng.integers(1, 3, 600))
    trace = ActivationTrace((clique_T[:, None, None] * 4 + np.arange(4)).astype(np.int16), 12)
    request = PlanRequest(4, 2, 4, load_cap=2.0, effort=0.2)
    found = optimize(trace, replace(request, prefer_local_replicas=True))
    assert found.far_fan_out[0] == pytest.approx((clique_T > 0).mean() / 2, abs=0.03)
    assert found.fan_out.tolist() == [1.0]
    holds_ER = found.placement.slots_LER[0] >= 0
    assert holds_ER[:4].reshape(4, 2, 2).any(2).all(), "the hot clique is not on both nodes"
    plain = evaluate(optimize(trace, request).placement, trace, prefer_local_replicas=True)
    assert found.far_fan_out[0] <= plain.far_fan_out[0]


def test_a_lost_rank_holds_nothing() -> None:
    trace = clique_trace()
    placement = optimize(trace, PlanRequest(5, 1, (4, 4, 0, 4, 4), load_cap=1.5, effort=SMALL)).placement
    assert (placement.experts_of_rank(2) == -1).all()


def test_a_slow_rank_gets_less() -> None:
    trace = clique_trace(purity=0.2)
    speeds = (1.0, 1.0, 1.0, 0.25)
    placement = optimize(trace, PlanRequest(4, 1, 6, load_cap=1.1, speeds=speeds, effort=SMALL)).placement
    load_LR = evaluate(placement, trace).load_LR
    assert (load_LR[:, 3] < 0.55 * load_LR[:, :3].mean(1)).all()


def test_bounded_moves_are_bounded() -> None:
    trace = clique_trace()
    current = Placement.linear(2, 16, 4)
    for moves in (0, 2, 6):
        request = PlanRequest(4, 1, 4, load_cap=1.3, max_moves=moves, effort=SMALL)
        placement = optimize(trace, request, current=current).placement
        assert (((placement.slots_LER >= 0) & (current.slots_LER < 0)).sum((1, 2)) <= moves).all()


def test_counts_alone_give_balance_and_say_so() -> None:
    counts = np.random.default_rng(0).lognormal(0, 1, (2, 16)) * 1000
    trace = ActivationTrace(np.zeros((0, 2, 1), np.int16), 16, counts=counts.astype(int))
    result = optimize(trace, PlanRequest(4, 1, 5, effort=SMALL))
    assert "only counts" in result.notes[0]
    assert np.isnan(result.fan_out).all()
    assert (result.balancedness > 0.95).all()


def test_a_budget_of_replicas_goes_where_it_gains() -> None:
    rng = np.random.default_rng(0)
    even = rng.permuted(np.tile(np.arange(16), (300, 1)), axis=1)[:, :2]
    hot = np.stack([np.zeros(300, int), rng.integers(1, 16, 300)], axis=1)
    trace = ActivationTrace(np.stack([even, hot], axis=1), 16)
    request = PlanRequest(4, 1, 6, replica_budget=3)
    filled_L = spread_replicas(trace, trace.load(), request)
    assert filled_L.sum() == 2 * 16 + 3
    assert filled_L[1] > filled_L[0]
    placement = optimize(trace, PlanRequest(4, 1, 6, replica_budget=3, effort=SMALL)).placement
    assert (placement.physical_to_logical_map >= 0).sum() <= 2 * 16 + 3


@pytest.mark.parametrize(("slots", "nodes"), [(4, 1), (5, 2)])
def test_the_clock_has_no_say_unless_it_cuts(slots, nodes, monkeypatch) -> None:
    trace = clique_trace()
    free = optimize(trace, PlanRequest(4, nodes, slots, effort=0.1))
    ticks = iter(range(10**9))
    # A machine on which every look at the clock takes 5 ms more.
    monkeypatch.setattr("placement.search.search_clock.time.perf_counter", lambda: next(ticks) * 0.005)
    slow = optimize(trace, PlanRequest(4, nodes, slots, effort=0.1, seconds=1e6), start_s=0.0)
    assert slow.placement == free.placement
    assert not slow.cut
    assert not free.cut
    ticks = iter(range(10**9))
    cut = optimize(trace, PlanRequest(4, nodes, slots, effort=0.1, seconds=0.9), start_s=0.0)
    assert cut.cut
    assert "cut short" in cut.notes[-1]


def test_told_to_stop_it_returns_the_best_so_far() -> None:
    trace = clique_trace()
    result = optimize(trace, PlanRequest(4, 1, 4, effort=100.0), stopped=lambda: True)
    assert result.placement.num_layers == 2


def test_an_expired_deadline_still_gives_a_plan() -> None:
    trace = clique_trace()
    result = optimize(trace, PlanRequest(4, 2, 5, seconds=0.01), start_s=time.perf_counter() - 1)
    assert (result.placement.logical_replica_count >= 1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slots_per_rank": 3}, "12 slots cannot hold 16 experts: at least 16 are needed"),
        ({"slots_per_rank": 4, "min_replicas": 2}, "16 slots cannot hold 16 experts in 2 replicas: at least 32"),
        ({"slots_per_rank": 16, "min_replicas": 5}, "5 replicas on different ranks need 5 ranks, there are 4"),
        ({"slots_per_rank": 24, "num_nodes": 2, "min_replicas": 3}, "3 replicas on different nodes need 3 nodes"),
        ({"slots_per_rank": 4, "load_cap": 0.9}, "load cap is 0.9"),
        ({"slots_per_rank": 4, "num_nodes": 3}, "4 ranks cannot be dealt evenly to 3 nodes"),
        ({"slots_per_rank": (4, 4)}, "slots are given for 2 ranks, there are 4"),
        ({"slots_per_rank": 4, "objective": "speed"}, "objective is 'speed'"),
        ({"slots_per_rank": 4, "max_moves": 3}, "max_moves needs the current placement"),
    ],
)
def test_impossible_requests_are_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        optimize(clique_trace(num_tokens=20), PlanRequest(**{"num_ranks": 4, "num_nodes": 1, **arguments}))


def test_a_current_placement_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="the current placement is for 2 layers of 8 experts, the trace for 2 of 16"):
        optimize(clique_trace(num_tokens=20), PlanRequest(4, 1, 4), current=Placement.linear(2, 8, 4))


def least_fan_out(ids_TK: np.ndarray, num_experts: int, limit: float) -> float:
    """Least mean fan-out of a split into two equal halves within a load limit, by trying all."""
    best = np.inf
    for half in combinations(range(1, num_experts), num_experts // 2 - 1):
        on_first_E = np.zeros(num_experts, bool)
        on_first_E[[0, *half]] = True
        first_TK = on_first_E[ids_TK]
        if max(first_TK.mean(), 1 - first_TK.mean()) * 2 <= limit:
            best = min(best, 1 + float((first_TK.any(1) & ~first_TK.all(1)).mean()))
    return best


def test_exact_on_two_ranks() -> None:
    """With a loose cap the plan must be the optimum, or within 1 %, on nearly all of thirty random cases."""
    within = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        weight_E = rng.lognormal(0, 0.7, 10)
        ids = np.stack([rng.choice(10, 3, replace=False, p=weight_E / weight_E.sum()) for _ in range(80)])[:, None]
        found = optimize(ActivationTrace(ids, 10), PlanRequest(2, 1, 5, load_cap=1.8, effort=SMALL)).fan_out[0]
        within += found <= 1.01 * least_fan_out(ids[:, 0], 10, 1.8)
    assert within >= 29
