"""The placement in use as a start of the planner: in the shape of a request, and who holds what.

E experts, R ranks, s slots of a rank.
"""

from __future__ import annotations

import numpy as np

from placement.placement import EMPTY, Placement
from placement.search.few_copies.resize import resize
from placement.search.problem import PlanRequest
from placement.search.replicas.holders import CLOSED

# Of an even load: what ranks added or gone leave uneven is for the search, which pays for copies.
WITHIN_TOLERANCE = 0.3


def near_current(current: Placement, request: PlanRequest, load_LE: np.ndarray) -> Placement | None:
    """The placement in use in the shape of the request, with as few copies as that takes; None where none was found."""
    slots_R = request.open_slots_R
    try:
        return resize(
            current,
            slots_R=slots_R.tolist(),
            usable_R=(slots_R > 0).tolist(),
            load_LE=load_LE,
            min_replicas=request.min_replicas,
            spare_slots=0,
            nodes=None,
            num_nodes=request.num_nodes,
            speed_R=request.speeds,
            tolerance=WITHIN_TOLERANCE,
        )
    except ValueError:
        return None


def current_slots(current: Placement, layer: int, request: PlanRequest) -> np.ndarray:
    """Slots int32 [R, s] of the current placement in the shape of the request; what does not fit is left out."""
    slots_Rs = np.full((request.num_ranks, int(request.open_slots_R.max())), EMPTY, np.int32)
    for rank in range(request.num_ranks):
        held = current.experts_of_rank(rank)[layer]
        unique = list(dict.fromkeys(held[held >= 0].tolist()))[: int(request.open_slots_R[rank])]
        if len(held) == slots_Rs.shape[1] and len(unique) == int((held >= 0).sum()):
            slots_Rs[rank] = held
        else:
            slots_Rs[rank, : len(unique)] = unique
    slots_Rs[np.arange(slots_Rs.shape[1])[None, :] >= request.open_slots_R[:, None]] = CLOSED
    return slots_Rs


def held_ER(current: Placement, layer: int, request: PlanRequest) -> np.ndarray:
    """bool [E, R]: which rank of the request holds which expert now."""
    held_ER = np.zeros((current.num_experts, request.num_ranks), bool)
    ranks = min(current.num_ranks, request.num_ranks)
    held_ER[:, :ranks] = current.slots_LER[layer][:, :ranks] >= 0
    return held_ER


def is_legal(slots_Rs: np.ndarray, request: PlanRequest, num_experts: int, max_filled: int) -> bool:
    """Whether slots hold every expert in enough replicas on different nodes (ranks, if there is one node)."""
    on_ER = np.zeros((num_experts, request.num_ranks), bool)
    rank_N, slot_N = np.nonzero(slots_Rs >= 0)
    on_ER[slots_Rs[rank_N, slot_N], rank_N] = True
    on_ED = on_ER if request.num_nodes == 1 else on_ER.reshape(num_experts, request.num_nodes, -1).any(2)
    return bool((on_ED.sum(1) >= request.min_replicas).all()) and len(rank_N) <= max_filled
