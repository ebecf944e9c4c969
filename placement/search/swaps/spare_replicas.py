"""More replicas for experts that are too hot, in the place of spare ones: the first step of a refresh.

E experts, R ranks, s slots of a rank. Loads are split evenly between the replicas of an expert.
"""

from __future__ import annotations

import numpy as np

from placement.compiled import compiled
from placement.rule.replica_choice import Holders, Nodes
from placement.search.annealing import as_int64, excess_of
from placement.search.replicas.holders import (
    CLOSED,
    add_holder,
    even_split,
    has_holder,
    holders_of,
    is_spread,
    remove_holder,
)

MIN_GAIN = 0.02  # excess load, in allowed loads, that a replacement must save to be worth a move
# Only a replica of at least this part of its rank's allowed load is a burden by itself; others are for swaps to move.
BURDEN = 0.3


@compiled()
def repair_replicas(
    load_E: np.ndarray, experts_Rs: np.ndarray, nodes: Nodes, allowed_R: np.ndarray, min_replicas: int, max_moves: int
) -> int:
    """Replace spare replicas by further ones of experts that are too hot; returns the number of moves.

    Each step takes the rank furthest above its limit and makes the one replacement, on any rank, by a further replica
    of one of its experts that brings the sum of excess loads down most. `experts_Rs` is changed.
    """
    holders = holders_of(experts_Rs, len(load_E))
    load_R = np.ascontiguousarray(even_split(holders, load_E.reshape(-1, 1))[:, 0])
    moves = 0
    while moves < max_moves:
        p = _fullest(load_R, allowed_R)
        if load_R[p] <= allowed_R[p]:
            break
        expert, rank, slot = _best_replacement(load_E, experts_Rs, nodes, allowed_R, min_replicas, holders, load_R, p)
        if expert < 0:
            break
        spare = experts_Rs[rank, slot]
        _add_shares(load_R, load_E, holders, expert, -1.0)
        if spare >= 0:
            _add_shares(load_R, load_E, holders, spare, -1.0)
            remove_holder(holders, spare, rank)
        add_holder(holders, expert, rank)
        _add_shares(load_R, load_E, holders, expert, 1.0)
        if spare >= 0:
            _add_shares(load_R, load_E, holders, spare, 1.0)
        experts_Rs[rank, slot] = expert
        moves += 1
    return moves


@compiled(forceinline=True)
def _fullest(load_R: np.ndarray, allowed_R: np.ndarray) -> int:
    most = 0
    for r in range(len(load_R)):
        if load_R[r] / allowed_R[r] > load_R[most] / allowed_R[most]:
            most = r
    return most


@compiled()
def _add_shares(load_R: np.ndarray, load_E: np.ndarray, holders: Holders, expert: int, sign: float) -> None:
    for h in range(holders.count_E[expert]):
        load_R[holders.rank_ER[expert, h]] += sign * (load_E[expert] / holders.count_E[expert])


@compiled()
def _best_replacement(
    load_E: np.ndarray,
    experts_Rs: np.ndarray,
    nodes: Nodes,
    allowed_R: np.ndarray,
    min_replicas: int,
    holders: Holders,
    load_R: np.ndarray,
    p: int,
) -> tuple[int, int, int]:
    """An expert of rank p, and the rank and slot for its further replica; -1 each if none saves enough."""
    num_ranks, num_slots = experts_Rs.shape
    excess = 0.0
    for r in range(num_ranks):
        excess += excess_of(load_R[r], allowed_R[r])
    best = excess - MIN_GAIN
    best_expert, best_rank, best_slot = as_int64(-1), as_int64(-1), as_int64(-1)
    trial_R = load_R.copy()
    for i in range(num_slots):
        hot = as_int64(experts_Rs[p, i])
        if hot < 0 or load_E[hot] / holders.count_E[hot] < BURDEN * allowed_R[p]:
            continue
        for q in range(num_ranks):
            if has_holder(holders, hot, q):
                continue
            for j in range(num_slots):
                spare = experts_Rs[q, j]
                if spare == CLOSED or (spare >= 0 and holders.count_E[spare] < 2):
                    continue
                trial_R[:] = load_R
                _replace(trial_R, load_E, holders, hot, spare, q)
                total = 0.0
                for r in range(num_ranks):
                    total += excess_of(trial_R[r], allowed_R[r])
                if total < best and _is_spare(holders, spare, q, nodes, min_replicas):
                    best, best_expert, best_rank, best_slot = total, hot, as_int64(q), as_int64(j)
    return best_expert, best_rank, best_slot


@compiled()
def _replace(load_R: np.ndarray, load_E: np.ndarray, holders: Holders, hot: int, spare: int, rank: int) -> None:
    """Loads after a further replica of `hot` on a rank, in the place of `spare`, which may be -1."""
    share = load_E[hot] / (holders.count_E[hot] + 1)
    for h in range(holders.count_E[hot]):
        load_R[holders.rank_ER[hot, h]] += share - load_E[hot] / holders.count_E[hot]
    load_R[rank] += share
    if spare >= 0:
        before = load_E[spare] / holders.count_E[spare]
        after = load_E[spare] / (holders.count_E[spare] - 1)
        for h in range(holders.count_E[spare]):
            load_R[holders.rank_ER[spare, h]] += after - before
        load_R[rank] -= after


@compiled()
def _is_spare(holders: Holders, expert: int, rank: int, nodes: Nodes, min_replicas: int) -> bool:
    """Whether an expert (-1 for none) keeps enough replicas without the one on a rank."""
    if expert < 0:
        return True
    remove_holder(holders, expert, rank)
    enough = is_spread(holders, expert, nodes, min_replicas)
    add_holder(holders, expert, rank)
    return bool(enough)
