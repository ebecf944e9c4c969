"""Balance from loads alone, without a search: greedy counts of replicas, greedy placing, even split.

E experts, R ranks, s slots of a rank, N nodes, D nodes or, where there is one node, ranks. Every replica takes an equal
share of its expert's load, which is all that counts of loads allow one to assume. Slots are int32 [R, s]: -1 is an
empty slot, -2 one that the rank does not have.
"""

from __future__ import annotations

import numpy as np

from placement.placement import EMPTY
from placement.search.replicas.holders import CLOSED


def closed_slots(open_slots_R: np.ndarray) -> np.ndarray:
    """int32 [R, s]: empty slots, and -2 for those that a rank does not have."""
    slots_Rs = np.full((len(open_slots_R), int(open_slots_R.max())), EMPTY, np.int32)
    slots_Rs[np.arange(slots_Rs.shape[1])[None, :] >= open_slots_R[:, None]] = CLOSED
    return slots_Rs


def even_split_load(experts_Rs: np.ndarray, load_E: np.ndarray) -> np.ndarray:
    """float64 [R]: load of each rank when the replicas of an expert share its load evenly."""
    held_Rs = experts_Rs >= 0
    count_E = np.bincount(experts_Rs[held_Rs], minlength=len(load_E))
    share_E = load_E / np.maximum(count_E, 1)
    return np.where(held_Rs, share_E[np.where(held_Rs, experts_Rs, 0)], 0.0).sum(1)


def greedy_replica_counts(load_E: np.ndarray, num_slots: int, max_replicas: int, min_replicas: int = 1) -> np.ndarray:
    """int64 [E]: replicas of each expert; each further slot goes to the expert with most load a replica.

    Like DeepSeek's EPLB, but no expert gets more than `max_replicas`. Slots that no expert can use stay free.
    """
    count_E = np.full(len(load_E), min_replicas, np.int64)
    for _ in range(num_slots - int(count_E.sum())):
        share_E = np.where(count_E < max_replicas, load_E / count_E, -1.0)
        expert = int(np.argmax(share_E))
        if share_E[expert] < 0:
            break
        count_E[expert] += 1
    return count_E


def greedy_balance(
    load_E: np.ndarray,
    open_slots_R: np.ndarray,
    node_of_rank_R: np.ndarray,
    num_nodes: int,
    speed_R: np.ndarray,
    min_replicas: int = 1,
    max_filled: int | None = None,
) -> np.ndarray:
    """Slots int32 [R, s] by greedy balancing: replicas by load, then the heaviest replica onto the lightest rank.

    `open_slots_R` int [R]: slots of each rank; `speed_R` float [R]: a rank of speed 2 takes twice the load. The first
    `min_replicas` replicas of an expert are on different nodes. Raises ValueError if the experts do not fit.
    """
    num_experts, num_ranks = len(load_E), len(open_slots_R)
    num_slots = min(int(open_slots_R.sum()), max_filled if max_filled is not None else int(open_slots_R.sum()))
    usable = int((open_slots_R > 0).sum())
    if num_slots < num_experts * min_replicas:
        raise ValueError(f"{num_slots} slots cannot hold {num_experts} experts with {min_replicas} replicas each")
    count_E = greedy_replica_counts(load_E, num_slots, usable, min_replicas)
    slots_Rs = closed_slots(open_slots_R)
    filled_R = np.zeros(num_ranks, np.int64)
    load_R = np.zeros(num_ranks)
    on_ER = np.zeros((num_experts, num_ranks), bool)
    # Experts that must be on several nodes come first: they are the hardest to place.
    order_key_E = [(count_E[e] > 1 and min_replicas > 1, load_E[e] / count_E[e], -e) for e in range(num_experts)]
    for expert in sorted(range(num_experts), key=lambda e: order_key_E[e], reverse=True):
        share = load_E[expert] / count_E[expert]
        for replica in range(int(count_E[expert])):
            free_R = (filled_R < open_slots_R) & ~on_ER[expert]
            if 0 < replica < min_replicas and num_nodes > 1:
                free_R &= ~np.isin(node_of_rank_R, node_of_rank_R[on_ER[expert]])
            if not free_R.any():
                if replica < min_replicas:
                    return _round_robin(load_E, open_slots_R, node_of_rank_R, num_nodes, min_replicas)
                break
            after_R = np.where(free_R, (load_R + share) / np.maximum(speed_R, 1e-12), np.inf)
            rank = int(np.argmin(after_R))
            slots_Rs[rank, filled_R[rank]] = expert
            filled_R[rank] += 1
            load_R[rank] += share
            on_ER[expert, rank] = True
    return slots_Rs


def _round_robin(
    load_E: np.ndarray, open_slots_R: np.ndarray, node_of_rank_R: np.ndarray, num_nodes: int, min_replicas: int
) -> np.ndarray:
    """Slots with exactly `min_replicas` of each expert on different nodes, dealt to where most slots are free."""
    num_ranks = len(open_slots_R)
    slots_Rs = closed_slots(open_slots_R)
    free_R = open_slots_R.astype(np.int64).copy()
    domain_R = node_of_rank_R if num_nodes > 1 else np.arange(num_ranks)
    for expert in np.argsort(-load_E, kind="stable"):
        free_D = np.bincount(domain_R, weights=free_R)
        for domain in np.argsort(-free_D, kind="stable")[:min_replicas]:
            rank = int(np.argmax(np.where(domain_R == domain, free_R, -1)))
            if free_R[rank] < 1:
                raise ValueError(
                    f"the slots of the nodes do not allow {min_replicas} replicas of every expert on different "
                    f"{'nodes' if num_nodes > 1 else 'ranks'}"
                )
            slots_Rs[rank, open_slots_R[rank] - free_R[rank]] = expert
            free_R[rank] -= 1
    return slots_Rs
