"""Annealing from a placement in use, where every expert that moves has a price: few moves that even out loads.

I items, G groups (ranks), s slots of a group; see `placement.search.swaps.state`. The energy also counts the items that
stand outside the group they started in, their home.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from placement.compiled import compiled
from placement.search.annealing import as_int64, fullest
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
from placement.xorshift import random_below, random_unit

COOLING_STEPS = 16  # proposals between two changes of heat
PROPOSAL_KINDS = 4  # two of four take an item off the fullest group, one sends an item home, one is any swap


class Prices(NamedTuple):
    """What the energy counts besides visits, in tokens.

    `excess_weight`: a group's load above what is allowed, for one allowed load. `move_cost`: an item that leaves its
    group. `heat_from`, `heat_to`: geometric.
    """

    excess_weight: float
    move_cost: float
    heat_from: float
    heat_to: float


@compiled(forceinline=True)
def _num_moved(items: Items, state: SwapState, home_I: np.ndarray, moves: int, a: int, b: int) -> int:
    """Items away from home, after a swap of two of them."""
    p, q = state.group_I[a], state.group_I[b]
    if items.expert_I[a] >= 0:
        moves += int(q != home_I[a]) - int(p != home_I[a])
    if items.expert_I[b] >= 0:
        moves += int(p != home_I[b]) - int(q != home_I[b])
    return moves


@compiled()
def anneal_few_moves(
    items: Items,
    groups: Groups,
    prices: Prices,
    item_Gs: np.ndarray,
    max_moves: int,
    proposals: int,
    random_1: np.ndarray,
) -> int:
    """Swap items towards the least of visits, excess load and moves; at most `max_moves` leave their group.

    `item_Gs` int32 holds the best slots met afterwards, the start among them; returns how many items moved.
    """
    state = swap_state(items, groups, item_Gs)
    home_I = state.group_I.copy()
    num_items, num_slots = len(home_I), item_Gs.shape[1]
    full = fullest(state.load_GM, groups.allowed_GM)
    best_item_Gs = item_Gs.copy()
    energy, best = 0.0, 0.0
    moves, best_moves = 0, 0
    away = np.empty(num_items, np.int32)
    num_away = 0
    heat = prices.heat_from
    for step in range(proposals):
        if step % COOLING_STEPS == 0:
            heat = prices.heat_from * (prices.heat_to / prices.heat_from) ** (step / proposals)
        kind = random_below(random_1, PROPOSAL_KINDS)
        if kind < 2:
            a = as_int64(item_Gs[full, random_below(random_1, num_slots)])
            b = random_below(random_1, num_items)
        elif kind == 2 and num_away:
            a = as_int64(away[random_below(random_1, num_away)])
            b = as_int64(item_Gs[home_I[a], random_below(random_1, num_slots)])
        else:
            a = random_below(random_1, num_items)
            b = random_below(random_1, num_items)
        if not differ(items, state, a, b):
            continue
        new_moves = _num_moved(items, state, home_I, moves, a, b)
        if new_moves > max_moves:
            continue
        change = prices.move_cost * (new_moves - moves)
        change += prices.excess_weight * excess_change(items, groups, state, a, b)
        limit = -heat * np.log(random_unit(random_1))
        if change > limit + 0.5 * prices.excess_weight or not is_legal_swap(items, groups, state, a, b):
            continue
        change = add_visits(change, items, groups, state, a, b)
        if change > limit:
            continue
        swap_items(items, groups, state, a, b)
        energy += change
        moves = new_moves
        num_away = 0
        for i in range(num_items):
            if state.group_I[i] != home_I[i] and items.expert_I[i] >= 0:
                away[num_away] = i
                num_away += 1
        full = fullest(state.load_GM, groups.allowed_GM)
        if energy < best - 1e-9:
            best, best_moves = energy, moves
            best_item_Gs[:] = item_Gs
    item_Gs[:] = best_item_Gs
    return best_moves
