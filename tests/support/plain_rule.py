"""The rule for choosing replicas, in plain numpy and Python (T tokens, K experts of one, E experts, R ranks)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def plain_rule(
    ids_TK: np.ndarray, slots_ER: np.ndarray, num_nodes: int, load_R: np.ndarray, work_R: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The ranks [T, K] that a batch's pairs go to, and the loads [R] after it. Nodes are equal blocks of ranks."""
    holds = slots_ER >= 0
    num_ranks = slots_ER.shape[1]
    per_node = num_ranks // num_nodes
    load = load_R.copy()
    rank_TK = np.full(ids_TK.shape, -1)
    for t, row in enumerate(ids_TK):
        wanted = np.unique(row[(row >= 0)])
        wanted = wanted[holds[wanted].any(1)]
        nodes_used: set[int] = set()
        while wanted.size:
            cover = holds[wanted].sum(0)
            if num_nodes > 1:
                node_holds = holds[wanted].reshape(len(wanted), num_nodes, per_node).any(2).sum(0)
                new = np.array([n not in nodes_used for n in range(num_nodes)])
                node = np.lexsort((load.reshape(num_nodes, per_node).min(1), new, -node_holds))[0]
                cover = np.where(np.arange(num_ranks) // per_node == node, cover, 0)
                nodes_used.add(int(node))
            rank = np.lexsort((load, -cover))[0]
            taken = holds[wanted, rank]
            load[rank] += taken.sum() * work_R[rank]
            rank_TK[t, np.isin(row, wanted[taken])] = rank
            wanted = wanted[~taken]
    holders = {e: np.flatnonzero(holds[e]).tolist() for e in range(len(holds))}
    ranks, loads = rank_TK.tolist(), load.tolist()
    nodes = (np.arange(num_ranks) // per_node).tolist()
    plain_even_out(ids_TK.tolist(), holders, nodes, work_R.tolist(), load_R.tolist(), loads, ranks)
    return np.array(ranks).reshape(rank_TK.shape), np.array(loads)


def plain_even_out(
    ids_TK: Sequence[Sequence[int]],
    holders: dict[int, list[int]],
    node_of_rank: Sequence[int],
    work: Sequence[int],
    before: Sequence[int],
    load: list[int],
    rank_TK: list[list[int]],
) -> None:
    """Change `load` and `rank_TK` as `placement.rule.even_out` does."""
    ranks = range(len(load))
    batch = [load[r] - before[r] for r in ranks]
    even = sum(batch) // len(load)
    slack = even // 12
    for ids, chosen in zip(ids_TK, rank_TK, strict=True):
        for k, expert in enumerate(ids):
            rank = chosen[k]
            if rank < 0 or batch[rank] <= even:
                continue
            visits = set(chosen) - {-1}
            costs = {}
            for r in holders[expert]:
                if r in visits:
                    costs[r] = batch[r] + work[r]
                elif node_of_rank[r] == node_of_rank[rank]:
                    if chosen.count(rank) == 1:
                        costs[r] = batch[r] + work[r]
                    elif slack >= 16 * work[rank]:
                        costs[r] = batch[r] + work[r] + slack
            best = min(costs, key=lambda r: (costs[r], r))
            if costs[best] < batch[rank]:
                batch[rank] -= work[rank]
                batch[best] += work[best]
                chosen[:] = [best if ids[j] == expert else chosen[j] for j in range(len(chosen))]
    load[:] = [before[r] + batch[r] for r in ranks]
