"""Balancing like DeepSeek's EPLB, as its README describes it; a candidate beside our own search.

E experts, R ranks, s slots of a rank. Each replica goes to the expert with most load a replica; then the heaviest
replica left goes to the lightest rank with a free slot. Unlike in our own placements, two replicas of an expert may
meet on a rank, which takes two shares of its load where engines split it evenly over replicas.
"""

from __future__ import annotations

import numpy as np

from placement.search.balance import greedy_replica_counts


def packed_slots(load_E: np.ndarray, num_ranks: int, slots_per_rank: int) -> np.ndarray:
    """Slots int32 [R, s], all filled. Needs at least as many slots as experts."""
    count_E = greedy_replica_counts(load_E, num_ranks * slots_per_rank, num_ranks * slots_per_rank)
    replicas = np.repeat(np.arange(len(load_E)), count_E)
    share_E = load_E / count_E
    slots_Rs = np.empty((num_ranks, slots_per_rank), np.int32)
    filled_R = np.zeros(num_ranks, np.int64)
    load_R = np.zeros(num_ranks)
    for expert in replicas[np.argsort(-share_E[replicas], kind="stable")]:
        rank = int(np.argmin(np.where(filled_R < slots_per_rank, load_R, np.inf)))
        slots_Rs[rank, filled_R[rank]] = expert
        filled_R[rank] += 1
        load_R[rank] += share_E[expert]
    return slots_Rs
