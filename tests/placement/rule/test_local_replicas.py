"""Near replicas first: nothing becomes unreachable, and nothing is fetched from afar that is near."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.rule.local_replicas import choose_local_first, keep_local
from placement.rule.replica_choice import choose_replicas


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 6))
def test_every_expert_keeps_its_near_slots_or_else_all(seed: int, num_ranks: int, num_experts: int) -> None:
    rng = np.random.default_rng(seed)
    slots_LER = rng.integers(-1, 4, (2, num_experts, num_ranks)).astype(np.int32)
    local_R = rng.random(num_ranks) < 0.5
    kept_LER = keep_local(slots_LER, local_R)
    for layer, expert in np.ndindex(2, num_experts):
        slots_R, kept_R = slots_LER[layer, expert], kept_LER[layer, expert]
        near = {rank for rank in range(num_ranks) if local_R[rank] and slots_R[rank] >= 0}
        everywhere = {rank for rank in range(num_ranks) if slots_R[rank] >= 0}
        assert {rank for rank in range(num_ranks) if kept_R[rank] >= 0} == (near or everywhere)
        assert all(kept_R[rank] in (-1, slots_R[rank]) for rank in range(num_ranks))
    assert kept_LER.dtype == np.int32


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 3), st.integers(0, 12))
def test_every_router_chooses_by_the_rule_from_what_is_near_to_it(
    seed: int, num_nodes: int, ranks_per_node: int, tokens: int
) -> None:
    rng = np.random.default_rng(seed)
    num_ranks, num_experts = num_nodes * ranks_per_node, 5
    slots_ER = np.where(rng.random((num_experts, num_ranks)) < 0.5, 0, -1).astype(np.int32)
    slots_ER[np.arange(num_experts), rng.integers(num_ranks, size=num_experts)] = 0
    node_R = (np.arange(num_ranks) // ranks_per_node).astype(np.int32)
    ids_TK = np.array([rng.permutation(num_experts)[:3] for _ in range(tokens)], np.int32).reshape(tokens, 3)
    work_R = rng.integers(1, 4, num_ranks)
    found_TK = choose_local_first(ids_TK, slots_ER, node_R, num_nodes, work_R)
    for home in range(num_nodes):
        near_ER = keep_local(slots_ER[None], node_R == home)[0]
        mine_TK = np.ascontiguousarray(ids_TK[home::num_nodes])
        alone_TK = np.empty(mine_TK.shape, np.int32)
        choose_replicas(mine_TK, near_ER, node_R, num_nodes, work_R, np.zeros(num_ranks, np.int64), alone_TK)
        assert found_TK[home::num_nodes].tolist() == alone_TK.tolist()


def test_a_mask_that_does_not_fit_is_refused() -> None:
    slots_LER = np.zeros((1, 2, 3), np.int32)
    for wrong in (np.ones(2, bool), np.ones(3, np.int8)):
        with pytest.raises(ValueError, match=r"local_R must be bool \[3\]"):
            keep_local(slots_LER, wrong)
