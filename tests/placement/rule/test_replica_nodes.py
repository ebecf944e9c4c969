"""The rule where ranks are dealt to nodes in any order, and what it tells of a token's visits.

T tokens, K experts of one, E experts, R ranks, N nodes.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.rule.replica_choice import (
    Holders,
    Nodes,
    block_of_nodes,
    check_top_k,
    choose_replicas,
    cover_scratch,
    cover_token,
)
from tests.support.plain_rule import plain_even_out


def plain_cover(
    wanted: list[int],
    holders: dict[int, list[int]],
    node_of_rank: list[int],
    num_nodes: int,
    load: list[int],
    work: list[int],
) -> dict[int, int]:
    """The rule for one token in plain Python, on sets; adds to `load`."""
    chosen: dict[int, int] = {}
    visited: set[int] = set()
    left = set(wanted)

    def covered(ranks: set[int]) -> set[int]:
        return {expert for expert in left if ranks & set(holders[expert])}

    while left:
        ranks = set(range(len(load)))
        if num_nodes > 1:
            groups = {n: {r for r in ranks if node_of_rank[r] == n} for n in range(num_nodes)}
            useful = [n for n in groups if covered(groups[n])]
            node = min(
                useful,
                key=lambda n: (-len(covered(groups[n])), n not in visited, min(load[r] for r in groups[n]), n),
            )
            visited.add(node)
            ranks = groups[node]
        rank = min(ranks, key=lambda r: (-len(covered({r})), load[r], r))
        for expert in covered({rank}):
            chosen[expert] = rank
            load[rank] += work[rank]
        left -= set(chosen)
    return chosen


@settings(max_examples=80)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_nodes=st.integers(1, 4),
    num_ranks=st.integers(1, 9),
    num_experts=st.integers(1, 12),
    density=st.sampled_from([0.1, 0.4, 0.9]),
)
def test_agrees_with_sets_wherever_ranks_stand(
    seed: int, num_nodes: int, num_ranks: int, num_experts: int, density: float
) -> None:
    rng = np.random.default_rng(seed)
    node_of_rank_R = rng.integers(num_nodes, size=num_ranks).astype(np.int32)
    holds_ER = rng.random((num_experts, num_ranks)) < density
    holds_ER[np.arange(num_experts), rng.integers(num_ranks, size=num_experts)] = True
    holders = {e: np.flatnonzero(holds_ER[e]).tolist() for e in range(num_experts)}
    top_k = int(rng.integers(1, min(num_experts, 6) + 1))
    ids_TK = np.stack([rng.permutation(num_experts)[:top_k] for _ in range(8)]).astype(np.int32)
    load_R, work_R = rng.integers(0, 4, num_ranks), rng.integers(1, 4, num_ranks)
    expected_load = load_R.tolist()
    expected_TK = []
    for row in ids_TK.tolist():
        chosen = plain_cover(row, holders, node_of_rank_R.tolist(), num_nodes, expected_load, work_R.tolist())
        expected_TK.append([chosen[expert] for expert in row])
    plain_even_out(
        ids_TK.tolist(), holders, node_of_rank_R.tolist(), work_R.tolist(), load_R.tolist(), expected_load, expected_TK
    )
    rank_TK = np.full(ids_TK.shape, -7, np.int32)
    slots_ER = np.where(holds_ER, 0, -1).astype(np.int32)
    choose_replicas(ids_TK, slots_ER, node_of_rank_R, num_nodes, work_R, load_R, rank_TK)
    assert rank_TK.tolist() == expected_TK
    assert load_R.tolist() == expected_load


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), num_nodes=st.integers(1, 3), per_node=st.integers(1, 3), in_order=st.booleans())
def test_a_token_is_told_how_many_ranks_and_nodes_it_visits_and_leaves_no_trace(
    seed: int, num_nodes: int, per_node: int, in_order: bool
) -> None:
    rng = np.random.default_rng(seed)
    num_ranks, num_experts = num_nodes * per_node, 8
    node_of_rank_R = (np.arange(num_ranks) // per_node).astype(np.int32)
    if not in_order:
        node_of_rank_R = rng.permutation(node_of_rank_R)
    holds_ER = rng.random((num_experts, num_ranks)) < rng.choice([0.2, 0.6])
    holds_ER[np.arange(num_experts), rng.integers(num_ranks, size=num_experts)] = True
    count_E = holds_ER.sum(1).astype(np.int32)
    rank_ER = np.full((num_experts, num_ranks), -1, np.int32)
    for expert in range(num_experts):
        rank_ER[expert, : count_E[expert]] = rng.permutation(np.flatnonzero(holds_ER[expert]))  # in any order
    work_R = rng.integers(1, 4, num_ranks)
    nodes = Nodes(node_of_rank_R, num_nodes, int(block_of_nodes(node_of_rank_R, num_nodes)), work_R)
    scratch = cover_scratch(num_ranks, num_nodes)
    load_R, chosen_E = np.zeros(num_ranks, np.int64), np.full(num_experts, -1, np.int32)
    expected_load = [0] * num_ranks
    for _ in range(6):
        wanted = rng.permutation(num_experts)[: rng.integers(1, num_experts + 1)].astype(np.int32)
        found = cover_token(wanted, len(wanted), Holders(count_E, rank_ER), nodes, load_R, chosen_E, scratch)
        holders = {e: rank_ER[e, : count_E[e]].tolist() for e in range(num_experts)}
        expected = plain_cover(
            wanted.tolist(), holders, node_of_rank_R.tolist(), num_nodes, expected_load, work_R.tolist()
        )
        assert {e: int(chosen_E[e]) for e in wanted.tolist()} == expected
        ranks = set(expected.values())
        assert tuple(map(int, found)) == (len(ranks), len({int(node_of_rank_R[r]) for r in ranks}))
        assert load_R.tolist() == expected_load
        for array in (scratch.held_R, scratch.held_N, scratch.visited_N):
            assert not array.any()


@pytest.mark.parametrize(
    ("node_of_rank", "num_nodes", "block"),
    [
        ([0, 0, 1, 1], 2, 2),
        ([0, 0, 0, 0], 1, 4),
        ([0, 1, 2], 3, 1),
        ([0, 1, 0, 1], 2, 0),
        ([1, 1, 0, 0], 2, 0),
        ([0, 0, 0, 1], 2, 0),
        ([0, 0, 1, 1, 1], 2, 0),
        ([0, 1], 3, 0),
        ([0, 0, 1, 0], 2, 0),
    ],
)
def test_nodes_of_equal_blocks_in_order(node_of_rank: list[int], num_nodes: int, block: int) -> None:
    assert block_of_nodes(np.array(node_of_rank, np.int32), num_nodes) == block


def test_what_decides_hand_worked() -> None:
    slots_ER = np.array([[0, -1, -1, 0], [-1, 0, 0, -1], [0, 0, -1, -1], [-1, -1, 0, 0]], np.int32)
    node_of_rank_R = np.array([0, 0, 1, 1], np.int32)
    for ids, load, expected in (
        ([0, 1], [0, 0, 0, 0], [0, 1]),  # both nodes hold both, equally little loaded: the lower one
        ([0, 1], [3, 3, 3, 2], [3, 2]),  # node 1 has the least loaded rank
        ([0, 1], [9, 2, 3, 3], [0, 1]),  # node 0 has, though not the one that is then taken
        ([2, 0], [5, 0, 0, 0], [0, 0]),  # rank 0 holds both
        ([2, 3], [0, 1, 1, 0], [0, 3]),  # each on its own, at the least loaded
        ([2, 3], [1, 0, 0, 1], [1, 2]),
        ([2, 2], [0, 0, 0, 0], [0, 0]),
    ):
        rank_TK, load_R = np.empty((1, 2), np.int32), np.array(load, np.int64)
        choose_replicas(np.array([ids], np.int32), slots_ER, node_of_rank_R, 2, np.ones(4, np.int64), load_R, rank_TK)
        assert rank_TK.tolist() == [expected]
        pairs = set(zip(ids, expected, strict=True))
        assert (load_R - load).tolist() == [sum(rank == r for _, rank in pairs) for r in range(4)]


def test_top_k_beyond_the_limit_is_refused() -> None:
    check_top_k(63)
    with pytest.raises(ValueError, match="top-k is 64, at most 63 is supported"):
        check_top_k(64)


def test_the_widest_token_that_the_rule_takes() -> None:
    """63 experts, each on a rank of its own and all on the last: one visit covers them all."""
    for num_nodes, node_of_rank_R in ((1, np.zeros(64, np.int32)), (2, (np.arange(64) // 32).astype(np.int32))):
        slots_ER = np.where(np.eye(63, 64, dtype=bool), 0, -1).astype(np.int32)
        slots_ER[:, 63] = 0
        rank_TK, load_R = np.empty((1, 63), np.int32), np.zeros(64, np.int64)
        ids_TK, work_R = np.arange(63, dtype=np.int32)[None], np.ones(64, np.int64)
        choose_replicas(ids_TK, slots_ER, node_of_rank_R, num_nodes, work_R, load_R, rank_TK)
        assert (rank_TK == 63).all()
        assert load_R.tolist() == [0] * 63 + [63]
