"""Annealing of slots with replicas, on what the rule for choosing replicas makes of every move.

T tokens, K experts of one, E experts, R ranks, s slots of a rank, N nodes, V views of holders. A move changes what one
or two slots hold; only tokens that want the experts in them are covered anew, by the very code that the router runs
(`cover_token`). Most moves are bad and are given up after a few dozen of those tokens. Energy, in tokens:

    sum over tokens of (ranks visited + node_weight * nodes visited)
    + penalty * T * sum over ranks of max(0, load / allowed - 1)

Where near replicas come first, a token's router sees the holders of its own view and counts loads of its own, and what
`node_weight` is paid for are ranks visited on other nodes.
"""

from __future__ import annotations

import numpy as np

from placement.compiled import compiled
from placement.placement import EMPTY
from placement.rule.replica_choice import block_of_nodes, cover_token
from placement.search.replicas.holders import (
    CLOSED,
    add_holder,
    count_far,
    has_holder,
    node_spread,
    remove_holder,
    see_holders,
)
from placement.xorshift import random_below, random_unit

# Planned loads may be above the cap by this much in all; the guard below the cap that was asked for is larger.
EXCESS_TOLERANCE = 0.002


@compiled()
def tokens_by_expert(topk_ids_TK: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that want each expert, ascending: int32 [pairs], and where each expert's begin: int64 [E + 1]."""
    num_tokens, top_k = topk_ids_TK.shape
    start_E = np.zeros(num_experts + 1, np.int64)
    for t in range(num_tokens):
        for k in range(top_k):
            if topk_ids_TK[t, k] >= 0:
                start_E[topk_ids_TK[t, k] + 1] += 1
    for e in range(num_experts):
        start_E[e + 1] += start_E[e]
    next_E = start_E[:-1].copy()
    token_N = np.empty(start_E[num_experts], np.int32)
    for t in range(num_tokens):
        for k in range(top_k):
            expert = topk_ids_TK[t, k]
            if expert >= 0:
                token_N[next_E[expert]] = t
                next_E[expert] += 1
    return token_N, start_E


@compiled()
def _excess(load_R: np.ndarray, allowed_R: np.ndarray) -> float:
    total = 0.0
    for r in range(len(load_R)):
        if load_R[r] > allowed_R[r]:
            total += load_R[r] / allowed_R[r] - 1
    return total


@compiled()
def anneal_replicas(
    topk_ids_TK: np.ndarray,
    token_N: np.ndarray,
    start_E: np.ndarray,
    pair_weight_E: np.ndarray,
    experts_Rs: np.ndarray,
    node_of_rank_R: np.ndarray,
    num_nodes: int,
    node_weight: float,
    home_T: np.ndarray,
    min_replicas: int,
    max_filled: int,
    allowed_R: np.ndarray,
    penalty_from: float,
    penalty_to: float,
    heat_from: float,
    heat_to: float,
    begin: float,
    end: float,
    iterations: int,
    state_1: np.ndarray,
    best_experts_Rs: np.ndarray,
    best_2: np.ndarray,
) -> None:
    """Run `iterations` proposals of the part `begin` to `end` (fractions) of an annealing schedule.

    Args:
        topk_ids_TK: int32 [T, K], distinct experts of each token, -1 at the end of a row. Tokens in random order.
        token_N, start_E: what `tokens_by_expert` returns.
        pair_weight_E: float64 [E], the load of one (token, expert) pair.
        experts_Rs: int32 [R, s], advanced; -1 an empty slot, -2 one that the rank does not have.
        home_T: int32 [T], the node of each token's router, where near replicas come first; else of length 0.
        min_replicas: different nodes (ranks, where there is one node) that each expert must stand on.
        max_filled: the most slots that may hold an expert.
        allowed_R: float64 [R], largest load of each rank.
        best_experts_Rs, best_2: the best slots met, their excess load and their weighted visits: less excess is
            better, then fewer visits. Fill `best_2` with infinity before the first call.
    """
    num_tokens, top_k = topk_ids_TK.shape
    num_experts = len(start_E) - 1
    num_ranks, num_slots = experts_Rs.shape
    prefer_local_replicas = len(home_T) > 0
    num_views = 1 + num_nodes if prefer_local_replicas else 1
    num_holders_VE = np.zeros((num_views, num_experts), np.int32)
    holders_VER = np.empty((num_views, num_experts, num_ranks), np.int32)
    num_holders_E, holders_ER = num_holders_VE[0], holders_VER[0]
    filled = 0
    for r in range(num_ranks):
        for i in range(num_slots):
            if experts_Rs[r, i] >= 0:
                add_holder(holders_ER, num_holders_E, experts_Rs[r, i], r)
                filled += 1
    for e in range(num_experts):
        see_holders(holders_VER, num_holders_VE, e, node_of_rank_R)
    chosen_E = np.empty(num_experts, np.int32)
    held_R = np.zeros(num_ranks, np.int64)
    held_N = np.zeros(num_nodes, np.int64)
    visited_N = np.zeros(num_nodes, np.int64)
    touched_R = np.empty(num_ranks, np.int32)
    touched_N = np.empty(num_nodes, np.int32)
    per_node = block_of_nodes(node_of_rank_R, num_nodes)

    # What the rule makes of the slots as they stand; every call starts anew from the rule.
    pairs_VR = np.zeros((num_views, num_ranks), np.int64)
    load_R = np.zeros(num_ranks)
    load_ER = np.zeros((num_experts, num_ranks))
    width_T = np.zeros(num_tokens, np.int64)
    rank_TK = np.full((num_tokens, top_k), -1, np.int16)
    visits_T = np.zeros(num_tokens)
    visits = 0.0
    for t in range(num_tokens):
        width = 0
        while width < top_k and topk_ids_TK[t, width] >= 0:
            width += 1
        width_T[t] = width
        view = 1 + home_T[t] if prefer_local_replicas else 0
        ranks, nodes = cover_token(
            topk_ids_TK[t], width, num_holders_VE[view], holders_VER[view], node_of_rank_R, num_nodes, per_node,
            pairs_VR[view], chosen_E, held_R, held_N, touched_R, touched_N, visited_N,
        )  # fmt: skip
        if prefer_local_replicas:
            nodes = count_far(topk_ids_TK[t], width, chosen_E, node_of_rank_R, view - 1)
        visits_T[t] = ranks + node_weight * nodes
        visits += visits_T[t]
        for k in range(width):
            expert = topk_ids_TK[t, k]
            rank_TK[t, k] = chosen_E[expert]
            load_R[chosen_E[expert]] += pair_weight_E[expert]
            load_ER[expert, chosen_E[expert]] += pair_weight_E[expert]
    excess = _excess(load_R, allowed_R)
    above = max(0.0, excess - EXCESS_TOLERANCE)
    if above < best_2[0] - 1e-9 or (above < best_2[0] + 1e-9 and visits < best_2[1] - 1e-9):
        best_2[0], best_2[1] = above, visits
        best_experts_Rs[:] = experts_Rs

    new_pairs_VR = np.empty_like(pairs_VR)
    new_load_R = np.empty(num_ranks)
    touched_T = np.empty(num_tokens, np.int32)
    new_rank_TK = np.empty((num_tokens, top_k), np.int16)
    new_visits_T = np.empty(num_tokens)

    for step in range(iterations):
        if step % 16 == 0:
            part = begin + (end - begin) * step / iterations
            heat = heat_from * (heat_to / heat_from) ** part
            penalty = num_tokens * penalty_from * (penalty_to / penalty_from) ** part

        # A proposal: slot i of rank p holds a; b comes there, either from slot j of rank q, which gets a for it, or
        # as a further copy (q = -1), which a's slot is given up for.
        p = random_below(state_1, num_ranks)
        if excess > 0 and random_below(state_1, 4) == 0:
            # What is over its limit gets more tries than chance would give it.
            for r in range(num_ranks):
                if load_R[r] / allowed_R[r] > load_R[p] / allowed_R[p]:
                    p = r
        i = random_below(state_1, num_slots)
        a = experts_Rs[p, i]
        if a == CLOSED:
            continue
        q = -1
        j = 0
        if (a >= 0 and num_holders_E[a] == 1) or random_below(state_1, 2) == 0:
            q = random_below(state_1, num_ranks)
            j = random_below(state_1, num_slots)
            b = experts_Rs[q, j]
            if q == p or b == CLOSED or a == b:
                continue
            if a >= 0 and has_holder(holders_ER, num_holders_E, a, q):
                continue
        else:
            b = random_below(state_1, num_experts)
            if a == EMPTY and filled >= max_filled:
                continue
        if b >= 0 and has_holder(holders_ER, num_holders_E, b, p):
            continue

        threshold = -heat * np.log(random_unit(state_1))
        # Loads after the move, roughly: most moves over the cap need no look at tokens.
        gone = 0.0
        if a >= 0:
            gone = load_ER[a, p]
        came = 0.0
        if b >= 0:
            if q >= 0:
                came = load_ER[b, q]
            else:
                for h in range(num_holders_E[b]):
                    came += load_ER[b, holders_ER[b, h]]
                came /= num_holders_E[b] + 1
        guess = excess - max(0.0, load_R[p] / allowed_R[p] - 1)
        guess += max(0.0, (load_R[p] - gone + came) / allowed_R[p] - 1)
        if q >= 0:
            guess -= max(0.0, load_R[q] / allowed_R[q] - 1)
            guess += max(0.0, (load_R[q] + gone - came) / allowed_R[q] - 1)
        if q < 0 and b >= 0:
            guess = min(guess, excess)
        guessed_limit = threshold - 0.5 * penalty * (guess - excess)
        count_a = start_E[a + 1] - start_E[a] if a >= 0 else 0
        count_b = start_E[b + 1] - start_E[b] if b >= 0 else 0
        if guessed_limit < -0.5 * (1 + node_weight) * (count_a + count_b):
            continue

        if a >= 0:
            remove_holder(holders_ER, num_holders_E, a, p)
            if q >= 0:
                add_holder(holders_ER, num_holders_E, a, q)
        if b >= 0:
            add_holder(holders_ER, num_holders_E, b, p)
            if q >= 0:
                remove_holder(holders_ER, num_holders_E, b, q)
        legal = True
        if a >= 0 and node_spread(holders_ER, num_holders_E, a, node_of_rank_R, num_nodes) < min_replicas:
            legal = False
        if b >= 0 and node_spread(holders_ER, num_holders_E, b, node_of_rank_R, num_nodes) < min_replicas:
            legal = False

        if a >= 0:
            see_holders(holders_VER, num_holders_VE, a, node_of_rank_R)
        if b >= 0:
            see_holders(holders_VER, num_holders_VE, b, node_of_rank_R)
        accepted = False
        touched = 0
        if legal:
            new_pairs_VR[:] = pairs_VR
            new_load_R[:] = load_R
            at_a = start_E[a] if a >= 0 else np.int64(0)
            end_a = start_E[a + 1] if a >= 0 else np.int64(0)
            at_b = start_E[b] if b >= 0 else np.int64(0)
            end_b = start_E[b + 1] if b >= 0 else np.int64(0)
            total = (end_a - at_a) + (end_b - at_b)
            delta = 0.0
            squares = 0.0
            look_at = 48
            accepted = True
            while at_a < end_a or at_b < end_b:
                # Merged by token, so that a token that wants both is looked at once.
                if at_b >= end_b or (at_a < end_a and token_N[at_a] <= token_N[at_b]):
                    t = token_N[at_a]
                    if at_b < end_b and token_N[at_b] == t:
                        at_b += 1
                        total -= 1
                    at_a += 1
                else:
                    t = token_N[at_b]
                    at_b += 1
                width = width_T[t]
                view = 1 + home_T[t] if prefer_local_replicas else 0
                for k in range(width):
                    r = rank_TK[t, k]
                    new_pairs_VR[view, r] -= 1
                    new_load_R[r] -= pair_weight_E[topk_ids_TK[t, k]]
                ranks, nodes = cover_token(
                    topk_ids_TK[t], width, num_holders_VE[view], holders_VER[view], node_of_rank_R, num_nodes, per_node,
                    new_pairs_VR[view], chosen_E, held_R, held_N, touched_R, touched_N, visited_N,
                )  # fmt: skip
                if prefer_local_replicas:
                    nodes = count_far(topk_ids_TK[t], width, chosen_E, node_of_rank_R, view - 1)
                for k in range(width):
                    expert = topk_ids_TK[t, k]
                    r = chosen_E[expert]
                    new_rank_TK[touched, k] = r
                    new_load_R[r] += pair_weight_E[expert]
                change = ranks + node_weight * nodes - visits_T[t]
                new_visits_T[touched] = visits_T[t] + change
                touched_T[touched] = t
                touched += 1
                delta += change
                squares += change * change
                if touched == look_at:
                    look_at *= 2
                    scale = total / touched
                    spread = np.sqrt(max(0.0, squares - delta * delta / touched)) * scale
                    if delta * scale - 2.0 * spread > guessed_limit:
                        accepted = False
                        break
            if accepted:
                new_excess = _excess(new_load_R, allowed_R)
                accepted = delta <= threshold - penalty * (new_excess - excess)
        if not accepted:
            if b >= 0:
                remove_holder(holders_ER, num_holders_E, b, p)
                if q >= 0:
                    add_holder(holders_ER, num_holders_E, b, q)
            if a >= 0:
                if q >= 0:
                    remove_holder(holders_ER, num_holders_E, a, q)
                add_holder(holders_ER, num_holders_E, a, p)
                see_holders(holders_VER, num_holders_VE, a, node_of_rank_R)
            if b >= 0:
                see_holders(holders_VER, num_holders_VE, b, node_of_rank_R)
            continue

        for n in range(touched):
            t = touched_T[n]
            for k in range(width_T[t]):
                expert = topk_ids_TK[t, k]
                load_ER[expert, rank_TK[t, k]] -= pair_weight_E[expert]
                load_ER[expert, new_rank_TK[n, k]] += pair_weight_E[expert]
                rank_TK[t, k] = new_rank_TK[n, k]
            visits_T[t] = new_visits_T[n]
        pairs_VR[:] = new_pairs_VR
        load_R[:] = new_load_R
        experts_Rs[p, i] = b
        if q >= 0:
            experts_Rs[q, j] = a
        elif a < 0:
            filled += 1
        visits += delta
        excess = new_excess
        above = max(0.0, excess - EXCESS_TOLERANCE)
        if above < best_2[0] - 1e-9 or (above < best_2[0] + 1e-9 and visits < best_2[1] - 1e-9):
            best_2[0], best_2[1] = above, visits
            best_experts_Rs[:] = experts_Rs
