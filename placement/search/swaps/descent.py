"""Steepest descent by swaps from slots as they stand: few moves, each the best there is.

I items, G groups, s slots of a group; see `placement.search.swaps.state`.
"""

from __future__ import annotations

import numpy as np

from placement.compiled import compiled
from placement.search.annealing import as_int64, fullest, fullness
from placement.search.swaps.state import (
    Groups,
    Items,
    SwapState,
    add_visits,
    differ,
    excess_change,
    is_legal_swap,
    swap_items,
    swap_state,
)
from placement.xorshift import random_below


@compiled()
def descend_swaps(
    items: Items,
    groups: Groups,
    excess_weight: float,
    min_gain: float,
    item_Gs: np.ndarray,
    max_moves: int,
    proposals: int,
    random_1: np.ndarray,
) -> int:
    """Improve by swaps, at most `max_moves` items moved; returns how many were.

    First loads: the group furthest above its limit makes the best of all its swaps, until it is within the limit or no
    swap helps. Then fan-out: of `proposals` random swaps, those that save `min_gain` or more. Energies are in tokens;
    `excess_weight` is that of one allowed load above the limit.
    """
    state = swap_state(items, groups, item_Gs)
    num_items = len(items.load_IM)
    moves = 0
    while moves < max_moves:
        p = fullest(state.load_GM, groups.allowed_GM)
        if fullness(state.load_GM[p], groups.allowed_GM[p]) <= 1:
            break
        a, b = _best_relief(items, groups, excess_weight, min_gain, state, p)
        if a < 0:
            break
        cost = _num_experts(items, a, b)
        if moves + cost > max_moves:
            return moves
        moves += cost
        swap_items(items, groups, state, a, b)
    for _ in range(proposals):
        if moves >= max_moves:
            break
        pair = random_below(random_1, num_items * num_items)
        a, b = pair // num_items, pair % num_items
        if not differ(items, state, a, b):
            continue
        change = excess_weight * excess_change(items, groups, state, a, b)
        if change > 0:
            continue
        change = add_visits(change, items, groups, state, a, b)
        if change >= -min_gain or not is_legal_swap(items, groups, state, a, b):
            continue
        cost = _num_experts(items, a, b)
        if moves + cost > max_moves:
            break
        moves += cost
        swap_items(items, groups, state, a, b)
    return moves


@compiled(forceinline=True)
def _num_experts(items: Items, a: int, b: int) -> int:
    """How many of two items are experts: what a swap of them costs in moves."""
    return int(items.expert_I[a] >= 0) + int(items.expert_I[b] >= 0)


@compiled()
def _best_relief(
    items: Items, groups: Groups, excess_weight: float, min_gain: float, state: SwapState, p: int
) -> tuple[int, int]:
    """The swap of an item of group p for a lighter one that brings energy down most; -1, -1 if none saves enough."""
    best = -min_gain
    best_a, best_b = as_int64(-1), as_int64(-1)
    mix = 0  # the one in which the group is fullest
    for m in range(1, state.load_GM.shape[1]):
        if state.load_GM[p, m] / groups.allowed_GM[p, m] > state.load_GM[p, mix] / groups.allowed_GM[p, mix]:
            mix = m
    for slot in range(state.item_Gs.shape[1]):
        a = as_int64(state.item_Gs[p, slot])
        for b in range(len(items.load_IM)):
            if not differ(items, state, a, b) or items.load_IM[a, mix] <= items.load_IM[b, mix]:
                continue
            change = excess_weight * excess_change(items, groups, state, a, b)
            if change >= 0:
                continue
            change = add_visits(change, items, groups, state, a, b)
            if change < best and is_legal_swap(items, groups, state, a, b):
                best, best_a, best_b = change, a, as_int64(b)
    return best_a, best_b
