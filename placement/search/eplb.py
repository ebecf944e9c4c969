"""Balance as DeepSeek's EPLB does it, from the description in its repository's README; a start for our own search.

E experts, R ranks, s slots of a rank. Copies are dealt to the expert with most load a copy; then the heaviest copy left
goes to the lightest rank that has a slot left. Unlike our own placements, two copies of one expert may meet on a rank:
where engines split an expert's load evenly over its copies, a rank then takes two shares of it.
"""

from __future__ import annotations

import numpy as np

from placement.search.balance import greedy_replica_counts


def packed_slots(load_E: np.ndarray, num_ranks: int, slots_per_rank: int) -> np.ndarray:
    """Slots int32 [R, s], all filled. Needs at least as many slots as experts."""
    count_E = greedy_replica_counts(load_E, num_ranks * slots_per_rank, num_ranks * slots_per_rank)
    copies = np.repeat(np.arange(len(load_E)), count_E)
    share_E = load_E / count_E
    slots_Rs = np.empty((num_ranks, slots_per_rank), np.int32)
    filled_R = np.zeros(num_ranks, np.int64)
    load_R = np.zeros(num_ranks)
    for expert in copies[np.argsort(-share_E[copies], kind="stable")]:
        rank = int(np.argmin(np.where(filled_R < slots_per_rank, load_R, np.inf)))
        slots_Rs[rank, filled_R[rank]] = expert
        filled_R[rank] += 1
        load_R[rank] += share_E[expert]
    return slots_Rs
