"""Steepest descent from a placement as it stands, with few moves: the compiled part of a refresh.

E experts, R ranks, s slots of a rank, I items, G groups, W words of tokens. The rank furthest above its limit gives
the item whose exchange brings most, load first, fan-out where that allows; an expert that is too hot for any rank gets
another copy in the place of one that is spare.
"""

from __future__ import annotations

import numpy as np

from placement.compiled import compiled
from placement.search.replicas.holders import CLOSED, add_holder, has_holder, node_spread, remove_holder
from placement.search.swaps.swap_search import collect_items, holds, parent_holds, swap_delta
from placement.xorshift import random_below


@compiled()
def _excess_of(load: float, allowed: float) -> float:
    return max(0.0, load / allowed - 1)


@compiled()
def repair_replicas(
    load_E: np.ndarray,
    experts_Rs: np.ndarray,
    node_of_rank_R: np.ndarray,
    num_nodes: int,
    allowed_R: np.ndarray,
    min_replicas: int,
    max_moves: int,
) -> int:
    """Give experts that are too hot further copies in the place of spare ones, under an even split; returns moves.

    Each step takes the rank furthest above its limit and makes the one replacement, anywhere, of a further copy of one
    of its experts that brings the sum of excess loads down most. `experts_Rs` is changed.
    """
    num_experts = len(load_E)
    num_ranks, num_slots = experts_Rs.shape
    num_holders_E = np.zeros(num_experts, np.int32)
    holders_ER = np.empty((num_experts, num_ranks), np.int32)
    load_R = np.zeros(num_ranks)
    for r in range(num_ranks):
        for i in range(num_slots):
            if experts_Rs[r, i] >= 0:
                add_holder(holders_ER, num_holders_E, experts_Rs[r, i], r)
    for e in range(num_experts):
        for h in range(num_holders_E[e]):
            load_R[holders_ER[e, h]] += load_E[e] / num_holders_E[e]
    moves = 0
    trial_R = load_R.copy()
    while moves < max_moves:
        p = 0
        excess = 0.0
        for r in range(num_ranks):
            excess += _excess_of(load_R[r], allowed_R[r])
            if load_R[r] / allowed_R[r] > load_R[p] / allowed_R[p]:
                p = r
        if load_R[p] <= allowed_R[p]:
            break
        best = excess - 0.02
        best_a, best_q, best_j = -1, -1, -1
        for i in range(num_slots):
            a = experts_Rs[p, i]
            # Only copies that are a burden by themselves: others are for swaps to move.
            if a < 0 or load_E[a] / num_holders_E[a] < 0.3 * allowed_R[p]:
                continue
            for q in range(num_ranks):
                if has_holder(holders_ER, num_holders_E, a, q):
                    continue
                for j in range(num_slots):
                    b = experts_Rs[q, j]
                    if b == CLOSED or (b >= 0 and num_holders_E[b] < 2):
                        continue
                    trial_R[:] = load_R
                    share = load_E[a] / (num_holders_E[a] + 1)
                    for h in range(num_holders_E[a]):
                        trial_R[holders_ER[a, h]] += share - load_E[a] / num_holders_E[a]
                    trial_R[q] += share
                    if b >= 0:
                        before = load_E[b] / num_holders_E[b]
                        after = load_E[b] / (num_holders_E[b] - 1)
                        for h in range(num_holders_E[b]):
                            trial_R[holders_ER[b, h]] += after - before
                        trial_R[q] -= after
                    total = 0.0
                    for r in range(num_ranks):
                        total += _excess_of(trial_R[r], allowed_R[r])
                    if total >= best:
                        continue
                    if b >= 0:
                        remove_holder(holders_ER, num_holders_E, b, q)
                        legal = node_spread(holders_ER, num_holders_E, b, node_of_rank_R, num_nodes) >= min_replicas
                        add_holder(holders_ER, num_holders_E, b, q)
                        if not legal:
                            continue
                    best, best_a, best_q, best_j = total, a, q, j
        if best_a < 0:
            break
        b = experts_Rs[best_q, best_j]
        for side in range(2):
            e = best_a if side == 0 else b
            if e >= 0:
                for h in range(num_holders_E[e]):
                    load_R[holders_ER[e, h]] -= load_E[e] / num_holders_E[e]
        if b >= 0:
            remove_holder(holders_ER, num_holders_E, b, best_q)
        add_holder(holders_ER, num_holders_E, best_a, best_q)
        for side in range(2):
            e = best_a if side == 0 else b
            if e >= 0:
                for h in range(num_holders_E[e]):
                    load_R[holders_ER[e, h]] += load_E[e] / num_holders_E[e]
        experts_Rs[best_q, best_j] = best_a
        moves += 1
    return moves


@compiled()
def descend_swaps(
    bits_IW: np.ndarray,
    load_I: np.ndarray,
    expert_I: np.ndarray,
    items_Gs: np.ndarray,
    parent_G: np.ndarray,
    allowed_G: np.ndarray,
    parent_weight: float,
    excess_weight: float,
    spread_parents: bool,
    max_moves: int,
    proposals: int,
    min_gain: float,
    state_1: np.ndarray,
) -> int:
    """Improve by swaps, at most `max_moves` items moved; returns how many were.

    First loads: the group furthest above its limit makes the best of all its swaps, until it is within or no swap
    helps. Then fan-out: of `proposals` random swaps those that save `min_gain` or more. Energies are in tokens.
    """
    num_items, num_words = bits_IW.shape
    num_groups, num_slots = items_Gs.shape
    num_parents = 0
    group_I = np.zeros(num_items, np.int32)
    load_G = np.zeros(num_groups)
    for g in range(num_groups):
        num_parents = max(num_parents, parent_G[g] + 1)
        for i in items_Gs[g]:
            group_I[i] = g
            load_G[g] += load_I[i]
    per_parent = num_groups // num_parents
    any_GW = np.empty((num_groups, num_words), np.uint64)
    one_GW = np.empty((num_groups, num_words), np.uint64)
    any_PW = np.empty((num_parents, num_words), np.uint64)
    one_PW = np.empty((num_parents, num_words), np.uint64)
    for g in range(num_groups):
        collect_items(bits_IW, items_Gs[g], any_GW[g], one_GW[g])
    two_levels = num_parents > 1 and parent_weight > 0
    if two_levels:
        for n in range(num_parents):
            collect_items(bits_IW, items_Gs[n * per_parent : (n + 1) * per_parent].ravel(), any_PW[n], one_PW[n])
    moves = 0
    proposal = 0
    repairing = True
    while moves < max_moves:
        best = -min_gain
        best_a, best_b = -1, -1
        if repairing:
            p = 0
            for g in range(num_groups):
                if load_G[g] / allowed_G[g] > load_G[p] / allowed_G[p]:
                    p = g
            if load_G[p] <= allowed_G[p]:
                repairing = False
                continue
            first, last = 0, num_slots * num_items
        else:
            if proposal >= proposals:
                break
            proposal += 1
            first = random_below(state_1, num_items * num_items)
            last = first + 1
            p = -1
        for pair in range(first, last):
            if repairing:
                a = items_Gs[p, pair // num_items]
            else:
                a = pair // num_items
                p = group_I[a]
            b = pair % num_items
            q = group_I[b]
            expert_a, expert_b = expert_I[a], expert_I[b]
            if q == p or expert_a == expert_b or min(expert_a, expert_b) == CLOSED:
                continue
            moved = load_I[a] - load_I[b]
            if repairing and moved <= 0:
                continue
            change = excess_weight * (
                _excess_of(load_G[p] - moved, allowed_G[p])
                + _excess_of(load_G[q] + moved, allowed_G[q])
                - _excess_of(load_G[p], allowed_G[p])
                - _excess_of(load_G[q], allowed_G[q])
            )
            if (repairing and change >= 0) or (not repairing and change > 0):
                continue
            crosses = two_levels and parent_G[p] != parent_G[q]
            change += swap_delta(bits_IW[a], bits_IW[b], any_GW[p], one_GW[p], any_GW[q], one_GW[q])
            if crosses:
                m, n = parent_G[p], parent_G[q]
                change += parent_weight * swap_delta(bits_IW[a], bits_IW[b], any_PW[m], one_PW[m], any_PW[n], one_PW[n])
            if change >= best:
                continue
            if (expert_a >= 0 and holds(items_Gs[q], expert_I, expert_a, b)) or (
                expert_b >= 0 and holds(items_Gs[p], expert_I, expert_b, a)
            ):
                continue
            if (
                spread_parents
                and parent_G[p] != parent_G[q]
                and (
                    (expert_a >= 0 and parent_holds(items_Gs, parent_G, expert_I, parent_G[q], expert_a, b))
                    or (expert_b >= 0 and parent_holds(items_Gs, parent_G, expert_I, parent_G[p], expert_b, a))
                )
            ):
                continue
            best, best_a, best_b = change, a, b
        if best_a < 0:
            repairing = False
            continue
        a, b = best_a, best_b
        cost = (expert_I[a] >= 0) + (expert_I[b] >= 0)
        if moves + cost > max_moves:
            break
        moves += cost
        p, q = group_I[a], group_I[b]
        for i in range(num_slots):
            if items_Gs[p, i] == a:
                items_Gs[p, i] = b
            if items_Gs[q, i] == b:
                items_Gs[q, i] = a
        group_I[a], group_I[b] = q, p
        load_G[p] += load_I[b] - load_I[a]
        load_G[q] += load_I[a] - load_I[b]
        for g in (p, q):
            collect_items(bits_IW, items_Gs[g], any_GW[g], one_GW[g])
        if two_levels and parent_G[p] != parent_G[q]:
            for n in (parent_G[p], parent_G[q]):
                collect_items(bits_IW, items_Gs[n * per_parent : (n + 1) * per_parent].ravel(), any_PW[n], one_PW[n])
    return moves
