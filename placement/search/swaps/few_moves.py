"""Annealing from a placement in use, where every expert that moves has its price: the least that evens out loads.

I items, G groups (ranks), s slots of a group, P parents (nodes), W words of 64 tokens. Items, groups and their sets of
tokens are those of the swap search; the energy also counts the items that stand outside of their first group.
"""

from __future__ import annotations

import numpy as np

from placement.compiled import compiled
from placement.search.swaps.swap_search import CLOSED, collect_items, holds, parent_holds, swap_delta
from placement.xorshift import random_below, random_unit


@compiled()
def _excess(load: float, allowed: float) -> float:
    return max(0.0, load / allowed - 1)


@compiled()
def anneal_few_moves(
    bits_IW: np.ndarray,
    load_I: np.ndarray,
    expert_I: np.ndarray,
    items_Gs: np.ndarray,
    parent_G: np.ndarray,
    allowed_G: np.ndarray,
    parent_weight: float,
    excess_weight: float,
    move_cost: float,
    spread_parents: bool,
    max_moves: int,
    heat_from: float,
    heat_to: float,
    proposals: int,
    state_1: np.ndarray,
) -> int:
    """Swap items, at most `max_moves` of which leave their group, towards the least of visits, excess load and moves.

    Visits, `excess_weight` (of a group's load above what is allowed, in allowed loads), `move_cost` and heat are in
    tokens. `items_Gs` int32 holds the best met afterwards, the start among it; returns how many items moved.
    """
    num_items = len(load_I)
    num_groups, num_slots = items_Gs.shape
    home_I = np.zeros(num_items, np.int32)
    load_G = np.zeros(num_groups)
    num_parents = 0
    for g in range(num_groups):
        num_parents = max(num_parents, parent_G[g] + 1)
        for i in items_Gs[g]:
            home_I[i] = g
            load_G[g] += load_I[i]
    group_I = home_I.copy()
    per_parent = num_groups // num_parents
    any_GW = np.empty((num_groups, bits_IW.shape[1]), np.uint64)
    one_GW = np.empty_like(any_GW)
    any_PW = np.empty((num_parents, bits_IW.shape[1]), np.uint64)
    one_PW = np.empty_like(any_PW)
    for g in range(num_groups):
        collect_items(bits_IW, items_Gs[g], any_GW[g], one_GW[g])
    two_levels = num_parents > 1 and parent_weight > 0
    if two_levels:
        for n in range(num_parents):
            collect_items(bits_IW, items_Gs[n * per_parent : (n + 1) * per_parent].ravel(), any_PW[n], one_PW[n])
    fullest = 0
    for g in range(num_groups):
        if load_G[g] / allowed_G[g] > load_G[fullest] / allowed_G[fullest]:
            fullest = g
    best_items_Gs = items_Gs.copy()
    energy, best = 0.0, 0.0
    moves, best_moves = 0, 0
    moved = np.empty(num_items, np.int32)
    num_moved = 0
    heat = heat_from
    for step in range(proposals):
        if step % 16 == 0:
            heat = heat_from * (heat_to / heat_from) ** (step / proposals)
        kind = random_below(state_1, 4)
        if kind < 2:
            a = items_Gs[fullest, random_below(state_1, num_slots)]
            b = random_below(state_1, num_items)
        elif kind == 2 and num_moved:
            # Back to where it came from.
            a = moved[random_below(state_1, num_moved)]
            b = items_Gs[home_I[a], random_below(state_1, num_slots)]
        else:
            a = random_below(state_1, num_items)
            b = random_below(state_1, num_items)
        p, q = group_I[a], group_I[b]
        expert_a, expert_b = expert_I[a], expert_I[b]
        if p == q or expert_a == expert_b or min(expert_a, expert_b) == CLOSED:
            continue
        new_moves = moves
        if expert_a >= 0:
            new_moves += int(q != home_I[a]) - int(p != home_I[a])
        if expert_b >= 0:
            new_moves += int(p != home_I[b]) - int(q != home_I[b])
        if new_moves > max_moves:
            continue
        change = load_I[a] - load_I[b]
        delta = move_cost * (new_moves - moves) + excess_weight * (
            _excess(load_G[p] - change, allowed_G[p])
            + _excess(load_G[q] + change, allowed_G[q])
            - _excess(load_G[p], allowed_G[p])
            - _excess(load_G[q], allowed_G[q])
        )
        limit = -heat * np.log(random_unit(state_1))
        if delta > limit + 0.5 * excess_weight:
            continue
        if (expert_a >= 0 and holds(items_Gs[q], expert_I, expert_a, b)) or (
            expert_b >= 0 and holds(items_Gs[p], expert_I, expert_b, a)
        ):
            continue
        crosses = parent_G[p] != parent_G[q]
        if (
            spread_parents
            and crosses
            and (
                (expert_a >= 0 and parent_holds(items_Gs, parent_G, expert_I, parent_G[q], expert_a, b))
                or (expert_b >= 0 and parent_holds(items_Gs, parent_G, expert_I, parent_G[p], expert_b, a))
            )
        ):
            continue
        delta += swap_delta(bits_IW[a], bits_IW[b], any_GW[p], one_GW[p], any_GW[q], one_GW[q])
        if two_levels and crosses:
            m, n = parent_G[p], parent_G[q]
            delta += parent_weight * swap_delta(bits_IW[a], bits_IW[b], any_PW[m], one_PW[m], any_PW[n], one_PW[n])
        if delta > limit:
            continue
        for i in range(num_slots):
            if items_Gs[p, i] == a:
                items_Gs[p, i] = b
            if items_Gs[q, i] == b:
                items_Gs[q, i] = a
        group_I[a], group_I[b] = q, p
        load_G[p] -= change
        load_G[q] += change
        for g in (p, q):
            collect_items(bits_IW, items_Gs[g], any_GW[g], one_GW[g])
        if two_levels and crosses:
            for n in (parent_G[p], parent_G[q]):
                collect_items(bits_IW, items_Gs[n * per_parent : (n + 1) * per_parent].ravel(), any_PW[n], one_PW[n])
        energy += delta
        moves = new_moves
        num_moved = 0
        for i in range(num_items):
            if group_I[i] != home_I[i] and expert_I[i] >= 0:
                moved[num_moved] = i
                num_moved += 1
        fullest = 0
        for g in range(num_groups):
            if load_G[g] / allowed_G[g] > load_G[fullest] / allowed_G[fullest]:
                fullest = g
        if energy < best - 1e-9:
            best, best_moves = energy, moves
            best_items_Gs[:] = items_Gs
    items_Gs[:] = best_items_Gs
    return best_moves
