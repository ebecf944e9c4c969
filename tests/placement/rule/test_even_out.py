"""The second pass of the rule: loads of a batch get more even, and visits stay few (T tokens, K experts, R ranks)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.rule.even_out import even_out
from placement.rule.replica_choice import choose_replicas
from tests.support.plain_rule import plain_even_out

NUM_EXPERTS = 24
ONE_EACH = np.ones(6, np.int64)  # all ranks equally fast


def chosen_at_random(
    rng: np.random.Generator, num_tokens: int, num_ranks: int, num_nodes: int, skew: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, who holds what, nodes, and some legal choice: int32 [T, 4], bool [E, R], int32 [R], int32 [T, 4]."""
    popular = np.exp(-skew * np.arange(NUM_EXPERTS))
    ids_TK = np.stack(
        [rng.choice(NUM_EXPERTS, 4, replace=False, p=popular / popular.sum()) for _ in range(num_tokens)]
        or [np.zeros(4)]
    ).astype(np.int32)[:num_tokens]
    holds_ER = rng.random((NUM_EXPERTS, num_ranks)) < 0.4
    holds_ER[np.arange(NUM_EXPERTS), rng.integers(num_ranks, size=NUM_EXPERTS)] = True
    node_R = rng.integers(num_nodes, size=num_ranks).astype(np.int32)
    rank_TK = np.array([[rng.choice(np.flatnonzero(holds_ER[e])) for e in row] for row in ids_TK], np.int32)
    return ids_TK, holds_ER, node_R, rank_TK.reshape(ids_TK.shape)


def evened(
    ids_TK: np.ndarray, holds_ER: np.ndarray, node_R: np.ndarray, rank_TK: np.ndarray, work_R: np.ndarray | None = None
) -> np.ndarray:
    """The choice after the pass, which has to agree with the plain form of it."""
    num_ranks = holds_ER.shape[1]
    work_R = np.ones(num_ranks, np.int64) if work_R is None else work_R
    holders = {e: np.flatnonzero(holds_ER[e]).tolist() for e in range(NUM_EXPERTS)}
    rank_ER = np.full(holds_ER.shape, -1, np.int32)
    for expert, ranks in holders.items():
        rank_ER[expert, : len(ranks)] = ranks
    count_E = holds_ER.sum(1).astype(np.int32)
    choosing_J = np.flatnonzero((count_E[ids_TK] > 1).any(1)).astype(np.int32)
    before_R = np.arange(num_ranks, dtype=np.int64)  # of earlier batches, which change nothing
    load_R = before_R + work_R * np.bincount(rank_TK.ravel(), minlength=num_ranks)
    expected_load, expected_TK = load_R.tolist(), rank_TK.tolist()
    plain_even_out(
        ids_TK.tolist(), holders, node_R.tolist(), work_R.tolist(), before_R.tolist(), expected_load, expected_TK
    )
    found_TK = rank_TK.copy()
    even_out(ids_TK, choosing_J, count_E, rank_ER, node_R, work_R, before_R, load_R, found_TK)
    assert found_TK.tolist() == expected_TK
    counted_R = before_R + work_R * np.bincount(found_TK.ravel(), minlength=num_ranks)
    assert load_R.tolist() == expected_load == counted_R.tolist()
    return found_TK


def visits(rank_TK: np.ndarray) -> list[int]:
    return [len(set(row)) for row in rank_TK.tolist()]


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_tokens=st.integers(0, 40),
    num_ranks=st.integers(1, 6),
    num_nodes=st.integers(1, 3),
    skew=st.sampled_from([0.0, 0.2]),
    equal=st.booleans(),
)
def test_small_batches_get_more_even_at_no_visit(
    seed: int, num_tokens: int, num_ranks: int, num_nodes: int, skew: float, equal: bool
) -> None:
    rng = np.random.default_rng(seed)
    ids_TK, holds_ER, node_R, rank_TK = chosen_at_random(rng, num_tokens, num_ranks, num_nodes, skew)
    work_R = ONE_EACH[:num_ranks] if equal else rng.integers(1000, 4000, num_ranks)
    found_TK = evened(ids_TK, holds_ER, node_R, rank_TK, work_R)
    before_R, after_R = (work_R * np.bincount(ranks.ravel(), minlength=num_ranks) for ranks in (rank_TK, found_TK))
    assert after_R.max() <= before_R.max()
    if equal:
        assert (after_R**2).sum() <= (before_R**2).sum()
    assert all(after <= before for after, before in zip(visits(found_TK), visits(rank_TK), strict=True))
    for token, row in enumerate(found_TK):
        assert holds_ER[ids_TK[token], row].all()
        assert set(node_R[row]) <= set(node_R[rank_TK[token]])


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_large_batches_pay_visits_for_it(num_nodes: int) -> None:
    """At 192 pairs a rank and above a visit may be worth it."""
    rng = np.random.default_rng(3)
    ids_TK, holds_ER, node_R, _ = chosen_at_random(rng, 600, 4, num_nodes, 0.2)
    slots_ER = np.where(holds_ER, 0, -1).astype(np.int32)
    rank_TK = np.where(holds_ER[ids_TK].any(-1), holds_ER[ids_TK].argmax(-1), -1).astype(np.int32)  # all to the first
    found_TK = evened(ids_TK, holds_ER, node_R, rank_TK)
    before_R, after_R = (np.bincount(ranks.ravel(), minlength=4) for ranks in (rank_TK, found_TK))
    assert after_R.max() < 0.8 * before_R.max()
    assert sum(visits(found_TK)) > sum(visits(rank_TK))
    whole_TK = np.empty_like(rank_TK)
    choose_replicas(ids_TK, slots_ER, node_R, num_nodes, ONE_EACH[:4], np.zeros(4, np.int64), whole_TK)
    assert evened(ids_TK, holds_ER, node_R, whole_TK).max() >= 0


def test_an_expert_that_occurs_twice_moves_as_one() -> None:
    ids_TK = np.array([[0, 0, 1, 2]] * 8, np.int32)
    holds_ER = np.zeros((NUM_EXPERTS, 2), bool)
    holds_ER[:3] = [[True, True], [True, False], [False, True]]
    found_TK = np.empty_like(ids_TK)
    load_R = np.zeros(2, np.int64)
    choose_replicas(
        ids_TK, np.where(holds_ER, 0, -1).astype(np.int32), np.zeros(2, np.int32), 1, ONE_EACH[:2], load_R, found_TK
    )
    assert (found_TK[:, 0] == found_TK[:, 1]).all()
    assert load_R.tolist() == [12, 12]
