"""The compiled rule against the same rule written plainly (T tokens, K experts of one, E experts, R ranks)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.placement import EMPTY, Placement
from placement.rule.replica_choice import choose_replicas
from tests.support.plain_rule import plain_rule


def choose(ids_TK, slots_ER, num_nodes, load_R, work_R=None):
    num_ranks = slots_ER.shape[1]
    work_R = np.ones(num_ranks, np.int64) if work_R is None else work_R
    node_of_rank_R = (np.arange(num_ranks) // (num_ranks // num_nodes)).astype(np.int32)
    rank_TK = np.full(ids_TK.shape, -7, np.int32)
    load_R = load_R.copy()
    choose_replicas(ids_TK, slots_ER, node_of_rank_R, num_nodes, work_R, load_R, rank_TK)
    return rank_TK, load_R


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_nodes=st.sampled_from([1, 2, 4]),
    ranks_per_node=st.integers(1, 4),
    num_experts=st.integers(1, 40),
    top_k=st.integers(1, 10),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    repeats=st.booleans(),
    unequal=st.booleans(),
)
def test_agrees_with_the_plain_rule(seed, num_nodes, ranks_per_node, num_experts, top_k, density, repeats, unequal):
    rng = np.random.default_rng(seed)
    num_ranks = num_nodes * ranks_per_node
    holds_ER = rng.random((num_experts, num_ranks)) < density
    if seed % 3:  # else some experts have no slot at all
        holds_ER[np.arange(num_experts), rng.integers(num_ranks, size=num_experts)] = True
    slots_ER = np.where(holds_ER, rng.permutation(holds_ER.size).reshape(holds_ER.shape), -1).astype(np.int32)
    num_tokens = int(rng.integers(0, 30))
    if repeats:
        ids_TK = rng.integers(-1, num_experts, (num_tokens, top_k)).astype(np.int32)
    else:
        ids_TK = np.stack(
            [rng.permutation(max(num_experts, top_k))[:top_k] for _ in range(num_tokens)] or [np.zeros(top_k)]
        ).astype(np.int32)
        ids_TK[ids_TK >= num_experts] = -1
    load_R = rng.integers(0, 5, num_ranks)
    work_R = rng.integers(1, 4, num_ranks) if unequal else np.ones(num_ranks, np.int64)
    rank_TK, after_R = choose(ids_TK, slots_ER, num_nodes, load_R, work_R)
    expected_TK, expected_R = plain_rule(ids_TK, slots_ER, num_nodes, load_R, work_R)
    np.testing.assert_array_equal(rank_TK, expected_TK)
    np.testing.assert_array_equal(after_R, expected_R)


def test_many_nodes_and_the_widest_top_k():
    rng = np.random.default_rng(0)
    slots_ER = np.where(rng.random((300, 140)) < 0.3, 1, -1).astype(np.int32)
    ids_TK = np.stack([rng.permutation(300)[:63] for _ in range(20)]).astype(np.int32)
    load_R = np.zeros(140, np.int64)
    for num_nodes in (1, 70, 140):
        rank_TK, after_R = choose(ids_TK, slots_ER, num_nodes, load_R)
        expected_TK, expected_R = plain_rule(ids_TK, slots_ER, num_nodes, load_R, np.ones(140, np.int64))
        np.testing.assert_array_equal(rank_TK, expected_TK)
        np.testing.assert_array_equal(after_R, expected_R)


@pytest.mark.parametrize("speeds", [(1.0, 1.0, 1.0, 0.25), (1.0, 2.0, 4.0, 1.0)], ids=str)
def test_loads_follow_speeds_where_every_rank_holds_everything(speeds):
    """Each rank gets its share of 512 pairs to a few, as tokens of one expert are free to go anywhere."""
    placement = Placement(4, 1, 4, np.tile(np.arange(4), (1, 4)), speeds=speeds)
    ids_TK = np.random.default_rng(0).integers(0, 4, (512, 1)).astype(np.int32)
    rank_TK, work_R = choose(ids_TK, placement.slots_LER[0], 1, np.zeros(4, np.int64), placement.work_R)
    pairs_R = np.bincount(rank_TK.ravel(), minlength=4)
    assert np.abs(pairs_R - 512 * placement.speed_R / placement.speed_R.sum()).max() <= 2
    assert work_R.tolist() == (pairs_R * placement.work_R).tolist()


def test_top_k_above_the_limit_is_refused():
    with pytest.raises(ValueError, match="top-k above 63"):
        choose(np.zeros((1, 64), np.int32), np.zeros((4, 2), np.int32), 1, np.zeros(2, np.int64))


def test_ids_beyond_the_experts_and_padding_get_no_rank():
    slots_ER = np.zeros((4, 2), np.int32)
    rank_TK, load_R = choose(np.array([[0, 9, -1, -5]], np.int32), slots_ER, 1, np.zeros(2, np.int64))
    assert rank_TK.tolist() == [[0, -1, -1, -1]]
    assert load_R.tolist() == [1, 0]


def test_lost_ranks_are_never_chosen():
    placement = Placement.linear(2, 8, 4, min_replicas=2)
    alive_R = np.array([True, False, True, True])
    slots_LER = np.where(alive_R, placement.slots_LER, np.int32(EMPTY))
    ids_TK = np.array([[0, 1, 2, 3], [4, 5, 6, 7]], np.int32)
    rank_TK, _ = choose(ids_TK, slots_LER[0], 1, np.zeros(4, np.int64))
    assert (rank_TK >= 0).all()
    assert not (rank_TK == 1).any()
