"""Loads made even by few copies: each step takes the copy that evens out most, and stops where none buys enough.

L layers, E experts, R ranks, W slots of a rank. Free slots up to the spare ones are used: a replica of a hot expert evens
out what no move can.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from placement.placement import EMPTY
from placement.search.few_copies.moves import (
    apply,
    best_of,
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

    A copy is worth it if it evens out as much as moving `tolerance` of an even load between two ranks that differ by
    twice that. The number of needed replicas and of spare slots stays what it is or grows.
    """
    map_LRW = map_LRW.copy()
    layers = np.arange(len(map_LRW))
    while layers.size:
        state = State(frame, map_LRW).of_layers(layers)
        off_LR = np.abs(state.load_LR / state.frame.even_L[:, None] - 1) > tolerance
        uneven = np.flatnonzero((off_LR & frame.used_R).any(1))
        if len(uneven) < len(layers):
            layers = layers[uneven]
            continue
        least_gain_L = (tolerance * state.frame.even_L) ** 2
        goes_on = np.zeros(len(layers), bool)
        for step in (_drop_or_copy, _copy_over_spare_replica, _swap):
            stuck = np.flatnonzero(~goes_on)
            if not stuck.size:
                break
            part = state.of_layers(stuck)
            new_LRW, done = step(part, least_gain_L[stuck])
            # Estimates leave out what two changes at once do to each other.
            after = State(part.frame, new_LRW)
            done = done[part.unevenness_L[done] - after.unevenness_L[done] >= least_gain_L[stuck][done] * (1 - 1e-9)]
            map_LRW[layers[stuck[done]]] = new_LRW[done]
            goes_on[stuck[done]] = True
        layers = layers[goes_on]
    return map_LRW


Step = Callable[[State, np.ndarray], tuple[np.ndarray, np.ndarray]]


def _drop_or_copy(state: State, least_gain_L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The map after the best single change of each layer, and the layers [N] that have one: nothing, or one copy."""
    room_LR = state.held_LR < state.frame.limit_R
    to_L, from_L = lightest(state, room_LR), heaviest_of(state, np.broadcast_to(state.frame.used_R, room_LR.shape))
    open_L = room_LR.any(1)
    change = best_of([
        moves_to(state, to_L, open_L),
        replicas_to(state, to_L, open_L),
        moves_from(state, from_L, room_LR),
        replicas_from(state, from_L, room_LR),
    ])  # fmt: skip
    drop = state.drop_cost_LRW.reshape(state.num_layers, -1)
    dropped_L = np.argmin(drop, axis=1)
    drop_cost_L = drop[np.arange(state.num_layers), dropped_L]
    drops = np.flatnonzero((drop_cost_L <= change.cost_L) & (drop_cost_L <= -least_gain_L))
    copies = np.flatnonzero((drop_cost_L > change.cost_L) & (change.cost_L <= -least_gain_L))
    map_LRW = apply(state, change, copies)
    map_LRW.reshape(state.num_layers, -1)[drops, dropped_L[drops]] = EMPTY
    return map_LRW, np.concatenate([drops, copies])


def _copy_over_spare_replica(state: State, least_gain_L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same for a rank without a free slot: a replica that is not needed makes way there."""
    drop_LR = state.drop_cost_LRW.min(2)
    full_LR = np.isfinite(drop_LR) & (state.held_LR >= state.frame.limit_R) & (state.held_LR <= state.frame.slots_R)
    to_L = lightest(state, full_LR)
    layers = np.flatnonzero(full_LR.any(1))
    map_LRW = state.map_LRW.copy()
    map_LRW[layers, to_L[layers], np.argmin(state.drop_cost_LRW[layers, to_L[layers]], axis=1)] = EMPTY
    freed = State(state.frame, map_LRW)
    open_L = full_LR.any(1)
    change = best_of([moves_to(freed, to_L, open_L), replicas_to(freed, to_L, open_L)])
    copies = np.flatnonzero(np.isfinite(change.cost_L))
    return apply(freed, change, copies), copies


def _swap(state: State, least_gain_L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same for two experts that change places, one of them on the heaviest or on the lightest rank: two copies."""
    used_LR = np.broadcast_to(state.frame.used_R, state.load_LR.shape)
    every = np.arange(state.num_layers)
    heavy = _best_swap(state, heaviest_of(state, used_LR))
    light = _best_swap(state, lightest(state, used_LR))
    cost_L, rank_L, slot_L, other_L, other_slot_L = np.where(heavy[0] <= light[0], np.stack(heavy), np.stack(light))
    layers = np.flatnonzero(cost_L <= -2 * least_gain_L)
    rank, slot, other, other_slot = (part[layers].astype(np.int64) for part in (rank_L, slot_L, other_L, other_slot_L))
    map_LRW = state.map_LRW.copy()
    map_LRW[layers, rank, slot] = state.map_LRW[layers, other, other_slot]
    map_LRW[layers, other, other_slot] = state.map_LRW[layers, rank, slot]
    return map_LRW, every[layers]


def _best_swap(state: State, rank_L: np.ndarray) -> tuple[np.ndarray, ...]:
    """The best swap with a slot of one rank of each layer: cost, rank, slot, other rank, other slot, all [L]."""
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
    return flat[every, best_L], rank_L, slot_L, other_L, other_slot_L
