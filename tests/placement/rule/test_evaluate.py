"""Evaluation against the scoring rule written plainly, token by token (T tokens, L layers, K experts of one)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.placement import Placement
from placement.rule.evaluate import dispatch_trace, evaluate, even_split_loads
from placement.traces.trace import ActivationTrace
from tests.support.plain_rule import plain_rule


def plain_score(ids_TK, map_S, num_ranks, num_nodes):
    """Fan-out, node fan-out, balancedness and even-split balancedness of one layer; the rule as the field states it."""
    slots, per_node = len(map_S) // num_ranks, num_ranks // num_nodes
    num_experts = int(max(ids_TK.max(), map_S.max())) + 1
    holds = np.zeros((num_experts, num_ranks), bool)
    copies, even = np.zeros(num_experts), np.zeros(num_ranks)
    for slot, expert in enumerate(map_S):
        if expert >= 0:
            holds[expert, slot // slots] = True
            copies[expert] += 1
    pairs = np.zeros(num_experts)
    for row in ids_TK:
        pairs[np.unique(row[row >= 0])] += 1
    for slot, expert in enumerate(map_S):
        if expert >= 0:
            even[slot // slots] += pairs[expert] / copies[expert]
    slots_ER = np.where(holds, 0, -1)
    idle_R, one_R = np.zeros(num_ranks, np.int64), np.ones(num_ranks, np.int64)
    rank_TK, load = plain_rule(np.sort(ids_TK, axis=1), slots_ER, num_nodes, idle_R, one_R)
    visited = [{rank for rank in row if rank >= 0} for row in rank_TK.tolist()]
    ranks_visited = sum(map(len, visited))
    nodes_visited = sum(len({rank // per_node for rank in row}) for row in visited)
    tokens = len(ids_TK)
    return ranks_visited / tokens, nodes_visited / tokens, load.mean() / load.max(), even.mean() / even.max()


def random_placement(rng, num_layers, num_experts, num_ranks, num_nodes, slots_per_rank):
    """Every expert somewhere, the rest of the slots at random or empty."""
    rows = []
    for _ in range(num_layers):
        row = rng.integers(-1, num_experts, num_ranks * slots_per_rank)
        row[rng.permutation(len(row))[:num_experts]] = rng.permutation(num_experts)
        rows.append(row)
    return Placement(num_ranks, num_nodes, num_experts, np.array(rows))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_nodes=st.sampled_from([1, 2, 4]),
    ranks_per_node=st.integers(1, 3),
    spare=st.integers(0, 3),
    num_experts=st.integers(2, 20),
)
def test_agrees_with_the_plain_rule(seed, num_nodes, ranks_per_node, spare, num_experts):
    rng = np.random.default_rng(seed)
    ranks = num_nodes * ranks_per_node
    placement = random_placement(rng, 2, num_experts, ranks, num_nodes, -(-num_experts // ranks) + spare)
    top_k = int(rng.integers(1, min(num_experts, 6) + 1))
    ids = np.stack([[rng.permutation(num_experts)[:top_k] for _ in range(2)] for _ in range(30)])
    found = evaluate(placement, ActivationTrace(ids, num_experts))
    for layer in range(2):
        expected = plain_score(ids[:, layer], placement.physical_to_logical_map[layer], ranks, num_nodes)
        got = (
            found.fan_out[layer], found.node_fan_out[layer], found.balancedness[layer],
            found.balancedness_even_split[layer],
        )  # fmt: skip
        np.testing.assert_allclose(got, expected)
        # The pieces agree with each other.
        assert found.load_LR[layer].sum() == ids[:, layer].size
        assert found.rows_LR[layer].sum() == pytest.approx(found.fan_out[layer] * 30)
        assert found.fan_out_histogram[layer].sum() == 30
        assert found.fan_out_histogram[layer] @ np.arange(top_k + 1) == pytest.approx(found.fan_out[layer] * 30)


def test_near_replicas_first_hand_worked():
    # A rank a node; expert 0 stands on both. Of tokens {0, 1}, {0, 1}, {0, 2} the second is of node 1's router.
    placement = Placement(2, 2, 3, np.array([[0, 1, 2, 0]]))
    trace = ActivationTrace(np.array([[[0, 1]], [[0, 1]], [[0, 2]]]), 3)
    assert dispatch_trace(placement, trace.topk_ids, prefer_local_replicas=True).tolist() == [[[0, 0], [1, 0], [0, 1]]]
    near, plain = evaluate(placement, trace, prefer_local_replicas=True), evaluate(placement, trace)
    assert near.far_fan_out.tolist() == [2 / 3]
    assert near.fan_out.tolist() == [5 / 3]
    assert near.load_LR.tolist() == [[4, 2]]
    # Without, the second token finds both on rank 0, away from its router, and the third both on rank 1.
    assert plain.far_fan_out.tolist() == [2 / 3]
    assert plain.fan_out.tolist() == [1]


def test_hand_worked():
    # Ranks hold {0, 1}, {2, 0}: the first token finds both its experts on rank 0, the second needs both ranks.
    placement = Placement(2, 1, 3, np.array([[0, 1, 2, 0]]))
    found = evaluate(placement, ActivationTrace(np.array([[[0, 1]], [[1, 2]]]), 3))
    assert found.fan_out.tolist() == [1.5]
    assert found.fan_out_histogram.tolist() == [[0, 1, 1]]
    assert found.load_LR.tolist() == [[3, 1]]
    assert found.rows_LR.tolist() == [[2, 1]]
    assert found.balancedness.tolist() == [2 / 3]
    assert even_split_loads(placement, np.array([[1, 2, 1]])).tolist() == [[2.5, 1.5]]


def test_padding_and_repeats_count_once_or_not_at_all():
    placement = Placement(2, 1, 4, np.array([[0, 1, 2, 3]]))
    found = evaluate(placement, ActivationTrace(np.array([[[0, 0, -1]], [[-1, -1, -1]]]), 4))
    assert found.load_LR.tolist() == [[1, 0]]
    assert found.fan_out.tolist() == [0.5]
    assert found.fan_out_histogram.tolist() == [[1, 1, 0, 0]]


def test_one_token():
    found = evaluate(Placement.linear(1, 4, 2), ActivationTrace(np.array([[[0, 3]]]), 4))
    assert found.summary() == {
        "fan_out": 2, "node_fan_out": 1, "far_fan_out": 0, "balancedness": 1, "balancedness_even_split": 1,
        "worst_balancedness": 1, "tokens": 1,
    }  # fmt: skip


def test_counts_alone_give_balance_alone():
    trace = ActivationTrace(np.zeros((0, 1, 2), np.int16), 4, counts=np.array([[3, 1, 1, 1]]))
    found = evaluate(Placement.linear(1, 4, 2), trace)
    assert np.isnan(found.fan_out).all()
    assert found.balancedness.tolist() == [0.75]


def test_a_placement_of_another_model_is_refused():
    trace = ActivationTrace(np.zeros((1, 2, 1), np.int16), 4)
    with pytest.raises(ValueError, match="the placement is for 2 layers of 8 experts, the trace for 2 of 4"):
        evaluate(Placement.linear(2, 8, 2), trace)


def test_dispatch_starts_every_layer_from_zero_load():
    placement = Placement(2, 1, 2, np.array([[0, 1, 1, 0]] * 2))
    rank_LTK = dispatch_trace(placement, np.array([[[0], [0]], [[0], [0]]], np.int16))
    assert rank_LTK[:, :, 0].tolist() == [[0, 1], [0, 1]]
