"""Every expert gets the replicas that it needs, and every rank its spare slots back, at few copies.

L layers, E experts, R ranks, W slots of a rank.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from placement.placement import EMPTY
from placement.search.few_copies.moves import apply, best_of, heaviest_of, lightest, moves_from, moves_to
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
        layers = np.flatnonzero(lacking_LE.any(1))
        if not layers.size:
            return map_LRW
        part = state.of_layers(layers)
        every = np.arange(len(layers))
        # What has no replica at all goes before what lacks another one.
        urgency = part.frame.load_LE / part.frame.load_LE.max() + 2 * (part.count_LE == 0)
        expert_A = np.argmax(np.where(lacking_LE[layers], urgency, -1.0), axis=1)
        # Tiers are told apart by their size: a lower one wins whatever the load.
        tier = np.where(part.held_LR < frame.limit_R, 0, np.where(part.held_LR < frame.slots_R, 4, 6))
        drop_cost = part.drop_cost_LRW
        tier = np.where((tier > 0) & np.isfinite(drop_cost.min(2)), 2, tier)
        near_AR = part.on_node_LEN[every, expert_A][:, frame.node_R] > 0
        tier = np.where(part.on_LRE[every, :, expert_A] | ~frame.used_R | (near_AR & frame.spread), 6, tier)
        tier = tier + near_AR  # where nodes need not differ, another node is better
        order = tier * (4 * part.frame.load_LE.sum(1).max() / part.frame.speed_R.min()) + part.load_LR
        rank_A = np.argmin(order, axis=1)
        tier_A = tier[every, rank_A]
        drops = every[(tier_A == 2) | (tier_A == 3)]
        slot = np.argmin(drop_cost[drops, rank_A[drops]], axis=1)
        map_LRW[layers[drops], rank_A[drops], slot] = EMPTY
        fits = every[tier_A < 6]
        freed = State(frame, map_LRW)
        slot = freed.free_slot(layers[fits], rank_A[fits])
        map_LRW[layers[fits], rank_A[fits], slot] = expert_A[fits]
        for index in every[tier_A >= 6]:
            layer = int(layers[index])
            if not _make_way(State(frame, map_LRW), map_LRW, layer, int(expert_A[index])):
                if give_up_LE is None:
                    raise LackingError(layer, int(expert_A[index]))
                give_up_LE[layer, expert_A[index]] = part.reach_LE[index, expert_A[index]]


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
    came_from.update({domain: (expert, -1) for domain in queue})
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

    Replicas that are not needed go first, which costs nothing.
    """
    map_LRW = map_LRW.copy()
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
            room_LR = state.held_LR < frame.limit_R
            to_L = lightest(state, room_LR)
            change = best_of([
                moves_to(state, to_L, room_LR.any(1), over_LR),
                moves_from(state, heaviest_of(state, over_LR), room_LR),
            ])  # fmt: skip
            moves = np.flatnonzero(np.isfinite(change.cost_L) & over_LR.any(1) & ~goes_on)
            map_LRW[open_layers[moves]] = apply(state, change, moves)[moves]
            goes_on[moves] = True
        open_layers = open_layers[goes_on]
    return map_LRW
