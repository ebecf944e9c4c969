"""The rule with a router's memory of its last batches, as routers and whatever foretells them call it."""

from __future__ import annotations

import numpy as np

from placement.compiled import compiled
from placement.rule.replica_choice import choose_replicas


@compiled()
def choose_ranks(
    topk_ids_TK: np.ndarray,
    slots_ER: np.ndarray,
    node_of_rank_R: np.ndarray,
    num_nodes: int,
    work_R: np.ndarray,
    rank_load_R: np.ndarray,
    rank_TK: np.ndarray,
) -> None:
    """`choose_replicas` for one batch after others: `rank_load_R` is halved first, so recent loads count most."""
    for rank in range(len(rank_load_R)):
        rank_load_R[rank] >>= 1
    choose_replicas(topk_ids_TK, slots_ER, node_of_rank_R, num_nodes, work_R, rank_load_R, rank_TK)
