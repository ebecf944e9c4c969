"""Placements by policy name: what each needs, what each keeps to, what is refused."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from placement.placement import Placement
from placement.policy import build_placement, fewest_slots
from placement.rule.evaluate import evaluate, even_split_loads
from placement.search.problem import PlanRequest
from placement.traces.trace import ActivationTrace


class Model(NamedTuple):
    """The size of a made-up model."""

    num_layers: int = 2
    num_experts: int = 8


def build(policy, num_ranks, num_nodes=1, slots_per_rank=None, *, model=None, trace=None, min_replicas=1, **options):
    """The placement of a policy, with as few slots as needed if their number is not given."""
    model = model or Model()
    slots = slots_per_rank or fewest_slots(model, num_ranks, num_nodes, min_replicas)
    request = PlanRequest(num_ranks, num_nodes, slots, min_replicas=min_replicas, **options)
    return build_placement(policy, request, model, trace)


def paired_trace(tokens=400, seed=0):
    """Experts n and n + 4 always together, in 2 layers; in linear order every pair is split."""
    first = np.random.default_rng(seed).integers(0, 4, (tokens, 2))
    return ActivationTrace(np.stack([first, first + 4], axis=2).astype(np.int16), 8)


@pytest.mark.parametrize("policy", ["linear", "random", "greedy", "optimized"])
@pytest.mark.parametrize(("min_replicas", "num_nodes"), [(1, 1), (2, 1), (2, 2)])
def test_every_policy_keeps_to_shape_and_replicas(policy, min_replicas, num_nodes):
    placement = build(policy, 4, num_nodes, 5, min_replicas=min_replicas, trace=paired_trace(), seconds=0.5)
    assert (placement.num_layers, placement.num_experts, placement.slots_per_rank) == (2, 8, 5)
    on_LER = placement.slots_LER >= 0
    homes_LE = on_LER.sum(2) if num_nodes == 1 else on_LER.reshape(2, 8, num_nodes, -1).any(3).sum(2)
    assert (homes_LE >= min_replicas).all()


def test_optimized_visits_no_more_ranks_than_greedy_whatever_the_time():
    trace = paired_trace()
    greedy = evaluate(build("greedy", 4, trace=trace, load_cap=1.3), trace)
    for seconds in (1e-6, 1.0):
        planned = evaluate(build("optimized", 4, trace=trace, load_cap=1.3, seconds=seconds), trace)
        assert (planned.fan_out <= greedy.fan_out).all()
        assert (planned.balancedness >= 1 / 1.3).all()


def test_greedy_evens_out_counts():
    counts = np.array([[100, 100, 1, 1], [1, 100, 1, 100]])
    trace = ActivationTrace(np.zeros((0, 2, 1), np.int16), 4, counts=counts)
    placement = build("greedy", 2, model=Model(2, 4), trace=trace)
    np.testing.assert_array_equal(even_split_loads(placement, counts), [[101, 101]] * 2)


def test_random_follows_the_seed():
    assert build("random", 2, 1, 5, seed=3) == build("random", 2, 1, 5, seed=3)
    assert build("random", 2, 1, 5, seed=3) != build("random", 2, 1, 5, seed=4)


def test_the_fewest_slots_are_those_that_a_linear_placement_takes():
    assert fewest_slots(Model(), 3) == build("linear", 3).slots_per_rank == 3
    assert fewest_slots(Model(), 4, min_replicas=2) == build("linear", 4, min_replicas=2).slots_per_rank == 4
    with pytest.raises(ValueError, match="3 slots a rank are too few for a linear placement, it takes 4"):
        build("linear", 4, 1, (9, 9, 9, 3), min_replicas=2)
    padded = build("linear", 4, 1, 3)
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
        build(**{"policy": "linear", "num_ranks": 2} | change)


@pytest.mark.parametrize("policy", ["greedy", "optimized"])
@pytest.mark.parametrize("model", [Model(3, 8), Model(2, 16)])
def test_a_trace_of_another_model_is_refused_with_both_numbers(policy, model):
    message = f"trace is for 2 layers of 8 experts, the model for {model.num_layers} of {model.num_experts}"
    with pytest.raises(ValueError, match=message):
        build(policy, 2, model=model, trace=paired_trace())
