"""Every expert gets the replicas that it needs, and every rank its spare slots back, at few copies.

L layers, E experts, R ranks, W slots of a rank.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from placement.placement import EMPTY
from placement.search.few_copies.moves import (
    Change,
    apply,
    best_of,
    cheapest_drop,
    heaviest_of,
    lightest,
    moves_from,
    moves_to,
)
from placement.search.few_copies.state import Frame, State


class LackingError(Exception):
    """Needed replicas that no order of slots can hold: layer, expert."""


def place_needed(frame: Frame, map_LRW: np.ndarray, give_up_LE: np.ndarray | None = None) -> np.ndarray:
    """int64 [L, R, W]: with all needed replicas, those of hot experts placed first, each on a light rank.

    A rank's free slots are used first, then slots of replicas that are not needed, then spare slots; where even that
    does not do, experts change ranks. Raises LackingError if it cannot be done; with `give_up_LE` int64 [L, E], the
    needed replicas, it lowers them there to what can be done.
    """
    map_LRW = map_LRW.copy()
    if give_up_LE is not None:
        frame = replace(frame, needed_LE=give_up_LE)
    while True:
        state = State(frame, map_LRW)
        lacking_LE = state.reach_LE < frame.needed_LE
        if not lacking_LE.any():
            return map_LRW
        for layer, expert in _place_one(state, lacking_LE, map_LRW, spare=True):
            if not _make_way(State(frame, map_LRW), map_LRW, layer, expert):
                if give_up_LE is None:
                    raise LackingError(layer, expert)
                give_up_LE[layer, expert] = state.reach_LE[layer, expert]


def place_hot(frame: Frame, map_LRW: np.ndarray) -> np.ndarray:
    """int64 [L, R, W]: with the replicas of `kept_LE`, as far as slots that are neither spare nor needed allow."""
    map_LRW = map_LRW.copy()
    lost_LE = np.zeros(frame.kept_LE.shape, bool)
    while True:
        state = State(frame, map_LRW)
        lacking_LE = (state.count_LE < frame.kept_LE) & ~lost_LE
        if not lacking_LE.any():
            return map_LRW
        for at in _place_one(state, lacking_LE, map_LRW, spare=False):
            lost_LE[at] = True


def _place_one(state: State, lacking_LE: np.ndarray, map_LRW: np.ndarray, spare: bool) -> list[tuple[int, int]]:
    """Write one lacking replica into every layer's map. Returns the layer and expert of those that found no slot."""
    frame = state.frame
    layers = np.flatnonzero(lacking_LE.any(1))
    part = state.of_layers(layers)
    every = np.arange(len(layers))
    # What has no replica at all goes before what lacks another one.
    urgency = part.share_LE / part.share_LE.max() + 2 * (part.count_LE == 0)
    expert_A = np.argmax(np.where(lacking_LE[layers], urgency, -1.0), axis=1)
    # Tiers are told apart by their size: a lower one wins whatever the load.
    tier = np.where(part.held_LR < frame.limit_R, 0, np.where((part.held_LR < frame.slots_R) & spare, 4, 6))
    drop_LR = cheapest_drop(part)
    may_drop_LR = (drop_LR >= 0) & (spare | (part.held_LR <= frame.limit_R))
    tier = np.where((tier > 0) & may_drop_LR, 2, tier)
    near_AR = part.on_node_LEN[every, expert_A][:, frame.node_R] > 0
    tier = np.where(part.on_LRE[every, :, expert_A] | ~frame.used_R | (near_AR & frame.spread & spare), 6, tier)
    tier = tier + near_AR  # where nodes need not differ, another node is better
    order = tier * (4 * part.frame.load_LE.sum(1).max() / part.frame.speed_R.min()) + part.load_LR
    rank_A = np.argmin(order, axis=1)
    tier_A = tier[every, rank_A]
    for index in every[tier_A < 6]:
        layer, rank = layers[index], rank_A[index]
        if tier_A[index] in (2, 3):
            slot = drop_LR[index, rank]
        else:
            slot = np.argmax(map_LRW[layer, rank] < 0)
        map_LRW[layer, rank, slot] = expert_A[index]
    return [(int(layers[index]), int(expert_A[index])) for index in every[tier_A >= 6]]


def _make_way(state: State, map_LRW: np.ndarray, layer: int, expert: int) -> bool:
    """Give an expert a slot by moving others on, in a chain as short as can be; False if there is no chain.

    Domains are the nodes if replicas must be on different ones, else the ranks. The search finds a chain whenever
    there is one: it augments a flow from experts to domains.
    """
    frame = state.frame
    domain_R = frame.node_R if frame.spread else np.arange(len(frame.slots_R))
    row_RW = map_LRW[layer]
    surplus_RW = state.surplus_LRW[layer]
    in_domain: dict[int, dict[int, tuple[int, int]]] = {}  # domain -> expert -> rank, slot
    free: dict[int, tuple[int, int]] = {}  # domain -> a slot that may be written
    for rank in np.flatnonzero(frame.used_R).tolist():
        domain = int(domain_R[rank])
        held = in_domain.setdefault(domain, {})
        for slot in range(int(frame.slots_R[rank])):
            if row_RW[rank, slot] == EMPTY or surplus_RW[rank, slot]:
                free.setdefault(domain, (rank, slot))
            if row_RW[rank, slot] != EMPTY:
                held[int(row_RW[rank, slot])] = (rank, slot)
    came_from: dict[int, tuple[int, int]] = {}  # domain -> the expert that would enter, the domain it would leave
    queue = [domain for domain in in_domain if expert not in in_domain[domain]]
    came_from.update(dict.fromkeys(queue, (expert, -1)))
    for domain in queue:
        if domain in free:
            target = free[domain]
            while domain >= 0:
                mover, before = came_from[domain]
                source = in_domain[before][mover] if before >= 0 else (-1, -1)
                row_RW[target] = mover
                target, domain = source, before
            return True
        for mover in in_domain[domain]:
            for further in in_domain:
                if further not in came_from and mover not in in_domain[further]:
                    came_from[further] = (mover, domain)
                    queue.append(further)
    return False


def restore_spare(frame: Frame, map_LRW: np.ndarray) -> np.ndarray:
    """int64 [L, R, W]: with the spare slots of each rank empty, as far as others have slots for what must leave.

    Replicas that are not needed go first, which costs nothing: those kept for their load have no right to spare slots.
    """
    frame, map_LRW = replace(frame, kept_LE=frame.needed_LE), map_LRW.copy()
    open_layers = np.flatnonzero((State(frame, map_LRW).held_LR > frame.limit_R).any(1))
    while open_layers.size:
        state = State(frame, map_LRW).of_layers(open_layers)
        over_LR = (state.held_LR > frame.limit_R) & frame.used_R
        drop = np.where(over_LR[:, :, None], state.drop_cost_LRW, np.inf).reshape(len(open_layers), -1)
        best_L = np.argmin(drop, axis=1)
        drops = np.flatnonzero(np.isfinite(drop[np.arange(len(open_layers)), best_L]))
        rank, slot = np.divmod(best_L[drops], map_LRW.shape[2])
        map_LRW[open_layers[drops], rank, slot] = EMPTY
        goes_on = np.zeros(len(open_layers), bool)
        goes_on[drops] = True
        if len(drops) < len(open_layers):
            change = _leaves_spare(state, over_LR)
            moves = np.flatnonzero(np.isfinite(change.cost_L) & over_LR.any(1) & ~goes_on)
            map_LRW[open_layers[moves]] = apply(state, change, moves)[moves]
            goes_on[moves] = True
        open_layers = open_layers[goes_on]
    return map_LRW


def _leaves_spare(state: State, over_LR: np.ndarray) -> Change:
    """A move of each layer out of `over_LR` to a rank with room: to the lightest or from the heaviest, else any."""
    room_LR = state.held_LR < state.frame.limit_R
    to_L = lightest(state, room_LR)
    change = best_of([
        moves_to(state, to_L, np.any(room_LR, axis=1), over_LR),
        moves_from(state, heaviest_of(state, over_LR), room_LR),
    ])  # fmt: skip
    if (np.isfinite(change.cost_L) | ~over_LR.any(1) | ~room_LR.any(1)).all():
        return change
    from_any = [
        moves_from(state, np.full(state.num_layers, rank), room_LR & over_LR[:, rank, None])
        for rank in np.flatnonzero(over_LR.any(0)).tolist()
    ]
    return best_of([change, *from_any])
