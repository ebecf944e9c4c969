"""Plans against oracles: all placements of tiny cases tried out, what a plan started from, and published examples.

T tokens, L layers, K experts of one, E experts, P topics.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, combinations_with_replacement

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.placement import Placement
from placement.policy import greedy_placement, random_placement
from placement.rule.evaluate import evaluate, even_split_loads
from placement.search.optimizer import optimize
from placement.search.problem import PlanRequest, load_guard
from placement.traces.trace import ActivationTrace

EFFORT = 0.001


def topical_trace(seed, tokens=150, num_layers=2, num_experts=8, top_k=2):
    """Tokens of three topics, each of which likes some experts better than others."""
    rng = np.random.default_rng(seed)
    like_LPE = rng.normal(0, 2.0, (num_layers, 3, num_experts))
    topic_T = rng.integers(3, size=tokens)
    noisy_TLE = like_LPE[:, topic_T].transpose(1, 0, 2) + rng.gumbel(size=(tokens, num_layers, num_experts))
    return ActivationTrace(np.argsort(-noisy_TLE, axis=2)[:, :, :top_k].astype(np.int16), num_experts)


@st.composite
def cases(draw):
    """A trace and a request that fit each other."""
    num_nodes, ranks_per_node = draw(st.sampled_from([1, 2])), draw(st.integers(1, 3))
    num_experts, seed = draw(st.integers(6, 12)), draw(st.integers(0, 10_000))
    ranks = num_nodes * ranks_per_node
    slots = -(-num_experts // ranks) + draw(st.integers(0, 2))
    cap = draw(st.sampled_from([1.02, 1.2, 2.0]))
    near = num_nodes > 1 and draw(st.booleans())
    request = PlanRequest(ranks, num_nodes, slots, load_cap=cap, prefer_local_replicas=near, seed=seed, effort=EFFORT)
    return topical_trace(seed, num_experts=num_experts), request


def not_worse(ours, theirs, request):
    """Whether each layer is within the cap (or as near as theirs), and visits no more where theirs is as near."""
    node_weight = request.node_weight if request.num_nodes > 1 else 0.0
    our_load_L, their_load_L = 1 / ours.balancedness, 1 / theirs.balancedness
    within_L = our_load_L <= np.maximum(request.load_cap, their_load_L) + 1e-9
    dear_L = theirs.node_fan_out - ours.node_fan_out
    if request.prefer_local_replicas:
        dear_L = theirs.far_fan_out - ours.far_fan_out
    gain_L = theirs.fan_out - ours.fan_out + node_weight * dear_L
    comparable_L = their_load_L <= np.maximum(request.load_cap, our_load_L) + 1e-9
    return bool((within_L & (~comparable_L | (gain_L >= -1e-9))).all())


@settings(max_examples=120)
@given(case=cases(), start=st.sampled_from([None, "random", "planned"]), moves=st.sampled_from([None, 3]))
def test_never_worse_than_greedy_balancing_nor_than_what_it_started_from(case, start, moves):
    trace, request = case
    current = None
    if start == "random":
        current = random_placement(trace, request)
    elif start == "planned":
        current = optimize(trace, replace(request, load_cap=3.0, seed=request.seed + 1)).placement
    if current is not None:
        request = replace(request, max_moves=moves, copy_price=0.0)  # greedy balancing does not ask what is held
    near = request.prefer_local_replicas
    ours = evaluate(optimize(trace, request, current).placement, trace, near)
    if near and request.slots_per_rank * request.num_ranks == trace.num_experts:
        request = replace(request, node_weight=0.0)  # single copies are as far from all routers wherever they stand
    if current is not None:
        assert not_worse(ours, evaluate(current, trace, near), request)
    if request.max_moves is None:
        assert not_worse(ours, evaluate(greedy_placement(trace, request), trace, near), request)


@settings(max_examples=15)
@given(case=cases(), order_seed=st.integers(0, 1000))
def test_experts_under_other_numbers_stand_in_the_same_slots(case, order_seed):
    trace, request = case
    map_LS = optimize(trace, request).placement.physical_to_logical_map
    new_of_old_E = np.random.default_rng(order_seed).permutation(trace.num_experts)
    renamed = optimize(replace(trace, topk_ids=new_of_old_E[trace.topk_ids]), request).placement
    old_of_new_E = np.argsort(new_of_old_E)
    back_LS = np.where(renamed.physical_to_logical_map >= 0, old_of_new_E[renamed.physical_to_logical_map], -1)
    for layer in range(trace.num_layers):
        # Experts that exactly the same tokens want (none, say) cannot be told apart but by their numbers.
        wants_ET = (trace.ids_of_layer(layer)[None] == np.arange(trace.num_experts)[:, None, None]).any(2)
        _, alike_E = np.unique(wants_ET, axis=0, return_inverse=True)
        names_E = np.append(alike_E.ravel(), -1)
        np.testing.assert_array_equal(names_E[back_LS[layer]], names_E[map_LS[layer]])


def least_by_trying_all(trace, num_ranks, slots, limit):
    """The least fan-out of all ways to give every rank `slots` different experts, within the limit."""
    best = np.inf
    for held in combinations_with_replacement(combinations(range(trace.num_experts), slots), num_ranks):
        row = [expert for block in held for expert in block]
        if len(set(row)) == trace.num_experts:
            figures = evaluate(Placement(num_ranks, 1, trace.num_experts, np.array([row])), trace)
            if 1 / figures.balancedness[0] <= limit + 1e-9:
                best = min(best, float(figures.fan_out[0]))
    return best


# Experts, ranks, slots of a rank; replicas in the last two.
@pytest.mark.parametrize("shape", [(6, 2, 3), (8, 2, 4), (6, 3, 2), (5, 2, 3), (6, 2, 4)], ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tiny_cases_reach_the_optimum(shape, seed):
    num_experts, num_ranks, slots = shape
    trace = topical_trace(100 + seed, tokens=60, num_layers=1, num_experts=num_experts)
    result = optimize(trace, PlanRequest(num_ranks, 1, slots, load_cap=1.6, seed=seed, effort=0.02))
    limit = 1.6 - load_guard(1.6, 60, 2, num_ranks, num_ranks * slots > num_experts)
    assert result.fan_out[0] <= least_by_trying_all(trace, num_ranks, slots, limit) * 1.01


def largest_loads(request, loads):
    """float64 [L]: what stands on the fullest rank when balance alone is planned and replicas share evenly."""
    trace = ActivationTrace(np.zeros((0, len(loads), 2), np.int16), loads.shape[1], counts=loads)
    return even_split_loads(optimize(trace, request).placement, loads).max(1)


def test_flashlb_toy_loads():
    """vllm-ascend: greedy balancing leaves 232 on the fullest rank, FlashLB 205."""
    loads = np.array([[600, 560, 120, 120, 20, 10, 10, 10]])
    assert largest_loads(PlanRequest(8, 1, 2, objective="balance"), loads)[0] <= 205


def test_deepseek_readme():
    """github.com/deepseek-ai/EPLB: 12 experts in 2 layers, 16 slots, 8 GPUs on 2 nodes, and the map shown there."""
    loads = np.array([[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
                      [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]])  # fmt: skip
    published = np.array([[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
                          [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]])  # fmt: skip
    theirs_L = even_split_loads(Placement(8, 2, 12, published), loads).max(1)
    assert (largest_loads(PlanRequest(8, 2, 2, objective="balance"), loads) <= theirs_L).all()


def test_one_token_and_one_expert():
    trace = ActivationTrace(np.zeros((1, 1, 1), np.int16), 1)
    assert optimize(trace, PlanRequest(1, 1, 1, effort=EFFORT)).placement.physical_to_logical_map.tolist() == [[0]]
    trace = ActivationTrace(np.array([[[0, 3]]]), 4)
    row = optimize(trace, PlanRequest(2, 1, 2, load_cap=2.0, effort=EFFORT)).placement.physical_to_logical_map[0]
    assert sorted(row.tolist()) == [0, 1, 2, 3]
