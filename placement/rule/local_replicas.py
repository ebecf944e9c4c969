"""Local replicas first: which replicas a router on a node leaves to choose from, for routers and planner.

T tokens, K experts of one, L layers, E logical experts, R ranks, N nodes.
"""

from __future__ import annotations

import numpy as np

from placement.rule.replica_choice import choose_replicas


def keep_local(slots_LER: np.ndarray, local_R: np.ndarray) -> np.ndarray:
    """int32 [L, E, R]: the slots without remote ones of experts that have a local one.

    Args:
        slots_LER: slot of each expert on each rank, -1 for none or a rank that is lost.
        local_R: bool, ranks that the router reaches without crossing a slower link.

    An expert without a local replica keeps all it has, so everything stays reachable, and `choose_replicas` on the
    result fetches only what is not local from remote ranks. If no rank is local, or every one, nothing changes.
    """
    local_R = np.asarray(local_R)
    if local_R.shape != slots_LER.shape[2:] or local_R.dtype != np.bool_:
        raise ValueError(f"local_R must be bool {list(slots_LER.shape[2:])}, got {local_R.dtype} {list(local_R.shape)}")
    has_local_LE1 = (slots_LER[:, :, local_R] >= 0).any(axis=2, keepdims=True)
    return np.where(has_local_LE1 & ~local_R, np.int32(-1), slots_LER).astype(np.int32)


def choose_local_first(
    topk_ids_TK: np.ndarray, slots_ER: np.ndarray, node_of_rank_R: np.ndarray, num_nodes: int, work_R: np.ndarray
) -> np.ndarray:
    """int32 [T, K]: the rank of each expert, chosen by a router on every node that takes local replicas first.

    Token t belongs to the router on node `t % num_nodes`, so tokens are shared evenly. Routers know nothing of each
    other's loads. Arguments and result are otherwise those of `choose_replicas`.
    """
    rank_TK = np.full(topk_ids_TK.shape, -1, np.int32)
    for node in range(num_nodes):
        local_ER = keep_local(slots_ER[None], node_of_rank_R == node)[0]
        loads_R = np.zeros(len(node_of_rank_R), np.int64)
        mine_TK = np.ascontiguousarray(topk_ids_TK[node::num_nodes], dtype=np.int32)
        chosen_TK = np.empty(mine_TK.shape, np.int32)
        choose_replicas(mine_TK, local_ER, node_of_rank_R, num_nodes, work_R, loads_R, chosen_TK)
        rank_TK[node::num_nodes] = chosen_TK
    return rank_TK
