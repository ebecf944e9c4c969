"""Lists of the ranks that hold each expert, kept up to date as a search moves experts.

E experts, R ranks, s slots of a rank, N nodes, Q routers that choose from lists of their own. Router 0 chooses from all
holders. Where routers prefer local replicas, router 1 + n is the one on node n: it chooses from the holders on its
node, or from all of them if there is none (`placement.rule.local_replicas`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from placement.compiled import compiled
from placement.rule.replica_choice import Holders, Nodes

CLOSED = -2  # a slot that the rank does not have


class RouterHolders(NamedTuple):
    """The `Holders` of every router: int32 [Q, E] and [Q, E, R]."""

    count_QE: np.ndarray
    rank_QER: np.ndarray


@compiled(forceinline=True)
def add_holder(holders: Holders, expert: int, rank: int) -> None:
    holders.rank_ER[expert, holders.count_E[expert]] = rank
    holders.count_E[expert] += 1


@compiled()
def remove_holder(holders: Holders, expert: int, rank: int) -> None:
    for j in range(holders.count_E[expert]):
        if holders.rank_ER[expert, j] == rank:
            holders.count_E[expert] -= 1
            holders.rank_ER[expert, j] = holders.rank_ER[expert, holders.count_E[expert]]
            return


@compiled()
def has_holder(holders: Holders, expert: int, rank: int) -> bool:
    for j in range(holders.count_E[expert]):  # noqa: SIM110
        if holders.rank_ER[expert, j] == rank:
            return True
    return False


@compiled(forceinline=True)
def collect_holders(holders: Holders, experts_Rs: np.ndarray) -> int:
    """Write the holders of all experts, rank by rank; returns how many slots hold an expert."""
    holders.count_E[:] = 0
    filled = 0
    for r in range(experts_Rs.shape[0]):
        for i in range(experts_Rs.shape[1]):
            if experts_Rs[r, i] >= 0:
                add_holder(holders, experts_Rs[r, i], r)
                filled += 1
    return filled


@compiled(forceinline=True)
def holders_of(experts_Rs: np.ndarray, num_experts: int) -> Holders:
    """The holders of all experts in slots int32 [R, s]."""
    holders = Holders(np.zeros(num_experts, np.int32), np.empty((num_experts, experts_Rs.shape[0]), np.int32))
    collect_holders(holders, experts_Rs)
    return holders


@compiled(forceinline=True)
def even_split(holders: Holders, load_EM: np.ndarray) -> np.ndarray:
    """float64 [R, M]: load of each rank when the replicas of an expert share its load evenly, in each mix."""
    load_RM = np.zeros((holders.rank_ER.shape[1], load_EM.shape[1]))
    for e in range(len(load_EM)):
        for h in range(holders.count_E[e]):
            for m in range(load_EM.shape[1]):
                load_RM[holders.rank_ER[e, h], m] += load_EM[e, m] / holders.count_E[e]
    return load_RM


@compiled()
def is_spread(holders: Holders, expert: int, nodes: Nodes, min_replicas: int) -> bool:
    """Whether an expert has replicas on `min_replicas` different nodes (ranks, where there is one node)."""
    count = holders.count_E[expert]
    if nodes.num == 1:
        return count >= min_replicas
    distinct = 0
    for j in range(count):
        new = 1
        for i in range(j):
            if nodes.of_rank_R[holders.rank_ER[expert, i]] == nodes.of_rank_R[holders.rank_ER[expert, j]]:
                new = 0
        distinct += new
    return distinct >= min_replicas


@compiled()
def update_local_holders(routers: RouterHolders, expert: int, nodes: Nodes) -> None:
    """Bring the lists of the routers on nodes up to date with router 0's, for one expert; with one router, nothing."""
    count_QE, rank_QER = routers.count_QE, routers.rank_QER
    for q in range(1, len(count_QE)):
        count = 0
        for j in range(count_QE[0, expert]):
            r = rank_QER[0, expert, j]
            if nodes.of_rank_R[r] == q - 1:
                rank_QER[q, expert, count] = r
                count += 1
        if count == 0:
            count = count_QE[0, expert]
            rank_QER[q, expert, :count] = rank_QER[0, expert, :count]
        count_QE[q, expert] = count


@compiled()
def count_remote_ranks(wanted_K: np.ndarray, num_wanted: int, chosen_E: np.ndarray, nodes: Nodes, home: int) -> int:
    """Distinct ranks on other nodes than `home` among those chosen for the first `num_wanted` experts of a token."""
    remote = 0
    for i in range(num_wanted):
        rank = chosen_E[wanted_K[i]]
        if nodes.of_rank_R[rank] != home:
            new = 1
            for j in range(i):
                if chosen_E[wanted_K[j]] == rank:
                    new = 0
            remote += new
    return remote
