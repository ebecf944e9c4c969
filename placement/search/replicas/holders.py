"""Which ranks hold an expert: lists that a search changes as it moves experts, and what the router of each node sees.

E experts, R ranks, N nodes, V views. `holders_ER[e, :num_holders_E[e]]` are the ranks of e, int32, in any order.
"""

from __future__ import annotations

import numpy as np

from placement.compiled import compiled

CLOSED = -2  # a slot that the rank does not have


@compiled()
def remove_holder(holders_ER: np.ndarray, num_holders_E: np.ndarray, expert: int, rank: int) -> None:
    for j in range(num_holders_E[expert]):
        if holders_ER[expert, j] == rank:
            num_holders_E[expert] -= 1
            holders_ER[expert, j] = holders_ER[expert, num_holders_E[expert]]
            return


@compiled()
def add_holder(holders_ER: np.ndarray, num_holders_E: np.ndarray, expert: int, rank: int) -> None:
    holders_ER[expert, num_holders_E[expert]] = rank
    num_holders_E[expert] += 1


@compiled()
def has_holder(holders_ER: np.ndarray, num_holders_E: np.ndarray, expert: int, rank: int) -> bool:
    for j in range(num_holders_E[expert]):  # noqa: SIM110
        if holders_ER[expert, j] == rank:
            return True
    return False


@compiled()
def node_spread(
    holders_ER: np.ndarray, num_holders_E: np.ndarray, expert: int, node_of_rank_R: np.ndarray, num_nodes: int
) -> int:
    """On how many different nodes (ranks, where there is one node) the copies of an expert stand."""
    count = num_holders_E[expert]
    if num_nodes == 1:
        return count
    distinct = 0
    for j in range(count):
        new = 1
        for i in range(j):
            if node_of_rank_R[holders_ER[expert, i]] == node_of_rank_R[holders_ER[expert, j]]:
                new = 0
        distinct += new
    return distinct


@compiled()
def see_holders(holders_VER: np.ndarray, num_holders_VE: np.ndarray, expert: int, node_of_rank_R: np.ndarray) -> None:
    """Bring the views of one expert up to date with view 0, which holds all of its ranks.

    View 1 + n is what a router on node n fetches from when near replicas come first (`placement.rule.local_replicas`):
    the ranks on its node if the expert has any there, else all. With one view there is nothing to do.
    """
    for v in range(1, len(num_holders_VE)):
        count = 0
        for j in range(num_holders_VE[0, expert]):
            r = holders_VER[0, expert, j]
            if node_of_rank_R[r] == v - 1:
                holders_VER[v, expert, count] = r
                count += 1
        if count == 0:
            count = num_holders_VE[0, expert]
            holders_VER[v, expert, :count] = holders_VER[0, expert, :count]
        num_holders_VE[v, expert] = count


@compiled()
def count_far(
    wanted_K: np.ndarray, num_wanted: int, chosen_E: np.ndarray, node_of_rank_R: np.ndarray, home: int
) -> int:
    """Distinct ranks on other nodes than `home` among those chosen for the first `num_wanted` experts of a token."""
    far = 0
    for i in range(num_wanted):
        rank = chosen_E[wanted_K[i]]
        if node_of_rank_R[rank] != home:
            new = 1
            for j in range(i):
                if chosen_E[wanted_K[j]] == rank:
                    new = 0
            far += new
    return far
