"""Loads made even by few copies: each step takes the copy that evens out most, and stops where none buys enough.

L layers, E experts, R ranks, W slots of a rank. Free slots up to the spare ones are used: a replica of a hot expert
evens out what no move can.
"""

from __future__ import annotations

import numpy as np

from placement.placement import EMPTY
from placement.search.few_copies.moves import (
    apply,
    best_of,
    cheapest_drop,
    heaviest_of,
    lightest,
    moves_from,
    moves_to,
    replicas_from,
    replicas_to,
)
from placement.search.few_copies.state import Frame, State


def even_out(frame: Frame, map_LRW: np.ndarray, tolerance: float) -> np.ndarray:
    """int64 [L, R, W]: the map with ranks within `tolerance` of their even load, as far as copies are worth it.

    First the heaviest rank of a layer is relieved until it is light enough or nothing relieves it, then the lightest
    is filled likewise. A copy is worth it if it evens out as much as moving `tolerance` of an even load between two
    ranks that differ by twice that. The number of needed replicas and of spare slots stays what it is or grows.
    """
    map_LRW = map_LRW.copy()
    for heavy in (True, False):
        layers = np.arange(len(map_LRW))
        state = State(frame, map_LRW)
        while layers.size:
            load_LR = state.load_LR[:, frame.used_R] / state.frame.even_L[:, None]
            uneven = load_LR.max(1) > 1 + tolerance if heavy else load_LR.min(1) < 1 - 2 * tolerance
            if not uneven.all():
                layers, state = layers[uneven], state.of_layers(np.flatnonzero(uneven))
                continue
            least_gain_L = (tolerance * state.frame.even_L) ** 2
            goes_on = np.zeros(len(layers), bool)
            for step in (_drop_or_copy, _copy_over_spare_replica, _swap):
                stuck = np.flatnonzero(~goes_on)
                if not stuck.size:
                    break
                part = state if len(stuck) == len(layers) else state.of_layers(stuck)
                new_LRW, done = step(part, least_gain_L[stuck], heavy)
                # Estimates leave out what two changes at once do to each other.
                after = State(part.frame, new_LRW)
                gain = part.unevenness_L[done] - after.unevenness_L[done]
                done = done[gain >= least_gain_L[stuck][done] * (1 - 1e-9)]
                map_LRW[layers[stuck[done]]] = new_LRW[done]
                goes_on[stuck[done]] = True
            # Figures of the first kind of step are those of the next state, if it did for all layers.
            all_done = len(after.map_LRW) == len(layers) == len(done)
            layers = layers[goes_on]
            state = after if all_done else State(frame, map_LRW).of_layers(layers)
    return map_LRW


def _drop_or_copy(state: State, least_gain_L: np.ndarray, heavy: bool) -> tuple[np.ndarray, np.ndarray]:
    """The map after the best single change of each layer, and the layers [N] that have one: nothing, or one copy."""
    every = np.arange(state.num_layers)
    room_LR = state.held_LR < state.frame.limit_R
    drop = state.drop_cost_LRW
    if heavy:
        from_L = heaviest_of(state, np.broadcast_to(state.frame.used_R, room_LR.shape))
        change = best_of([moves_from(state, from_L, room_LR), replicas_from(state, from_L, room_LR)])
        only_LR = np.zeros(room_LR.shape, bool)
        only_LR[every, from_L] = True
        drop = np.where(only_LR[:, :, None], drop, np.inf)
    else:
        to_L = lightest(state, np.broadcast_to(state.frame.used_R, room_LR.shape))
        open_L = room_LR[every, to_L]
        change = best_of([moves_to(state, to_L, open_L), replicas_to(state, to_L, open_L)])
    drop = drop.reshape(state.num_layers, -1)
    dropped_L = np.argmin(drop, axis=1)
    drop_cost_L = drop[every, dropped_L]
    drops = np.flatnonzero((drop_cost_L <= change.cost_L) & (drop_cost_L <= -least_gain_L))
    copies = np.flatnonzero((drop_cost_L > change.cost_L) & (change.cost_L <= -least_gain_L))
    map_LRW = apply(state, change, copies)
    map_LRW.reshape(state.num_layers, -1)[drops, dropped_L[drops]] = EMPTY
    return map_LRW, np.concatenate([drops, copies])


def _copy_over_spare_replica(state: State, least_gain_L: np.ndarray, heavy: bool) -> tuple[np.ndarray, np.ndarray]:
    """The same where the target has no free slot: a replica that is not needed makes way there."""
    every = np.arange(state.num_layers)
    drop_LR = cheapest_drop(state)
    full_LR = (drop_LR >= 0) & (state.held_LR >= state.frame.limit_R)
    if heavy:
        from_L = heaviest_of(state, np.broadcast_to(state.frame.used_R, full_LR.shape))
        change = best_of([moves_from(state, from_L, full_LR, drop_LR), replicas_from(state, from_L, full_LR, drop_LR)])
        layers = np.flatnonzero(change.cost_L <= -least_gain_L)
        return apply(state, change, layers, drop_LR), layers
    to_L = lightest(state, full_LR)
    layers = np.flatnonzero(full_LR.any(1))
    map_LRW = state.map_LRW.copy()
    map_LRW[layers, to_L[layers], drop_LR[layers, to_L[layers]]] = EMPTY
    freed = State(state.frame, map_LRW)
    open_L = full_LR[every, to_L]
    change = best_of([moves_to(freed, to_L, open_L), replicas_to(freed, to_L, open_L)])
    layers = np.flatnonzero(np.isfinite(change.cost_L))
    return apply(freed, change, layers), layers


def _swap(state: State, least_gain_L: np.ndarray, heavy: bool) -> tuple[np.ndarray, np.ndarray]:
    """The same for two experts that change places: two copies."""
    used_LR = np.broadcast_to(state.frame.used_R, state.load_LR.shape)
    rank_L = heaviest_of(state, used_LR) if heavy else lightest(state, used_LR)
    cost_L, slot_L, other_L, other_slot_L = _best_swap(state, rank_L)
    layers = np.flatnonzero(cost_L <= -2 * least_gain_L)
    rank, slot, other, other_slot = (part[layers] for part in (rank_L, slot_L, other_L, other_slot_L))
    map_LRW = state.map_LRW.copy()
    map_LRW[layers, rank, slot] = state.map_LRW[layers, other, other_slot]
    map_LRW[layers, other, other_slot] = state.map_LRW[layers, rank, slot]
    return map_LRW, layers


def _best_swap(state: State, rank_L: np.ndarray) -> tuple[np.ndarray, ...]:
    """The best swap with a slot of one rank of each layer: cost, slot, other rank, other slot, all [L]."""
    every = np.arange(state.num_layers)
    frame = state.frame
    num_layers, num_ranks, width = state.map_LRW.shape
    mine_LW = state.map_LRW[every, rank_L]
    less = state.share_LRW[every, rank_L][:, :, None, None] - state.share_LRW[:, None]  # [L, W, R, W]
    weight = (frame.weight_R[rank_L][:, None] + frame.weight_R)[:, None, :, None]
    gap = (state.load_LR - state.load_LR[every, rank_L][:, None])[:, None, :, None]
    cost = less * (less * weight + 2 * gap)
    theirs_there = state.of_slots(state.on_LRE[every, rank_L])  # [L, R, W]: their expert is on my rank too
    mine_there = state.on_LRE.transpose(0, 2, 1)[every[:, None], np.maximum(mine_LW, 0)]  # [L, W, R]
    legal = (mine_LW >= 0)[:, :, None, None] & (state.filled_LRW & ~theirs_there)[:, None]
    legal = legal & ~mine_there[:, :, :, None]
    if frame.spread:
        # Experts that need several replicas stay on their nodes.
        one_LE = frame.needed_LE <= 1
        same_R = frame.node_R[None, :] == frame.node_R[rank_L][:, None]
        mine_one = one_LE[every[:, None], np.maximum(mine_LW, 0)]
        legal &= same_R[:, None, :, None] | (mine_one[:, :, None, None] & state.of_slots(one_LE)[:, None])
    flat = np.where(legal, cost, np.inf).reshape(num_layers, -1)
    best_L = np.argmin(flat, axis=1)
    slot_L, there_L = np.divmod(best_L, num_ranks * width)
    other_L, other_slot_L = np.divmod(there_L, width)
    return flat[every, best_L], slot_L, other_L, other_slot_L
