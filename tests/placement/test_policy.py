"""Placements by policy name: what each needs, what each keeps to, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from placement.placement import Placement
from placement.policy import build_placement
from placement.rule.evaluate import evaluate, even_split_loads
from placement.traces.trace import ActivationTrace

SHAPE = {"num_layers": 2, "num_experts": 8}


def paired_trace(tokens=400, seed=0):
    """Experts n and n + 4 always together, in 2 layers; in linear order every pair is split."""
    first = np.random.default_rng(seed).integers(0, 4, (tokens, 2))
    return ActivationTrace(np.stack([first, first + 4], axis=2).astype(np.int16), 8)


@pytest.mark.parametrize("policy", ["linear", "random", "greedy", "optimized"])
@pytest.mark.parametrize(("min_replicas", "num_nodes"), [(1, 1), (2, 1), (2, 2)])
def test_every_policy_keeps_to_shape_and_replicas(policy, min_replicas, num_nodes):
    placement = build_placement(
        policy, **SHAPE, num_ranks=4, num_nodes=num_nodes, slots_per_rank=5, min_replicas=min_replicas,
        trace=paired_trace(), time_budget_s=0.5,
    )  # fmt: skip
    assert (placement.num_layers, placement.num_experts, placement.slots_per_rank) == (2, 8, 5)
    on_LER = placement.slots_LER >= 0
    homes_LE = on_LER.sum(2) if num_nodes == 1 else on_LER.reshape(2, 8, num_nodes, -1).any(3).sum(2)
    assert (homes_LE >= min_replicas).all()


def test_optimized_visits_no_more_ranks_than_greedy_whatever_the_time():
    trace = paired_trace()
    build = {"num_ranks": 4, **SHAPE, "trace": trace, "load_cap": 1.3}
    greedy = evaluate(build_placement("greedy", **build), trace)
    for time_budget_s in (1e-6, 1.0):
        planned = evaluate(build_placement("optimized", **build, time_budget_s=time_budget_s), trace)
        assert (planned.fan_out <= greedy.fan_out).all()
        assert (planned.balancedness >= 1 / 1.3).all()


def test_greedy_evens_out_counts():
    counts = np.array([[100, 100, 1, 1], [1, 100, 1, 100]])
    trace = ActivationTrace(np.zeros((0, 2, 1), np.int16), 4, counts=counts)
    placement = build_placement("greedy", num_layers=2, num_experts=4, num_ranks=2, trace=trace)
    np.testing.assert_array_equal(even_split_loads(placement, counts), [[101, 101]] * 2)


def test_random_follows_the_seed():
    build = {"num_ranks": 2, **SHAPE, "slots_per_rank": 5}
    assert build_placement("random", **build, seed=3) == build_placement("random", **build, seed=3)
    assert build_placement("random", **build, seed=3) != build_placement("random", **build, seed=4)


def test_slots_default_to_what_experts_need():
    assert build_placement("linear", **SHAPE, num_ranks=3).slots_per_rank == 3
    assert build_placement("linear", **SHAPE, num_ranks=4, min_replicas=2).slots_per_rank == 4
    padded = build_placement("linear", **SHAPE, num_ranks=4, slots_per_rank=3)
    assert padded.physical_to_logical_map[0].tolist() == [0, 1, -1, 2, 3, -1, 4, 5, -1, 6, 7, -1]
    assert padded.slots_per_rank == 3
    assert isinstance(padded, Placement)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": "magic"}, "placement policy is 'magic', expected one of linear, random, greedy, optimized"),
        ({"policy": "greedy"}, "'greedy' needs a trace"),
        ({"policy": "optimized"}, "'optimized' needs a trace"),
        ({"slots_per_rank": 3, "num_ranks": 2}, "6 slots cannot hold 8 experts"),
        ({"min_replicas": 3}, "3 replicas on different ranks need 3 ranks, there are 2"),
        ({"num_ranks": 4, "num_nodes": 2, "min_replicas": 3}, "different nodes need 3 nodes, there are 2"),
        ({"num_ranks": 4, "num_nodes": 3}, "4 ranks cannot be dealt evenly to 3 nodes"),
        ({"policy": "greedy", "trace": paired_trace(), "load_cap": 0.5}, "load cap is 0.5, expected at least 1"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        build_placement(**{"policy": "linear", **SHAPE, "num_ranks": 2} | change)


@pytest.mark.parametrize("policy", ["greedy", "optimized"])
@pytest.mark.parametrize("shape", [{"num_layers": 3, "num_experts": 8}, {"num_layers": 2, "num_experts": 16}])
def test_a_trace_of_another_model_is_refused_with_both_numbers(policy, shape):
    message = f"trace has 2 layers of 8 experts, the model {shape['num_layers']} of {shape['num_experts']}"
    with pytest.raises(ValueError, match=message):
        build_placement(policy, **shape, num_ranks=2, trace=paired_trace())
