"""Annealing by swaps on fan-out itself, over bit sets of tokens; every item serves a fixed set of tokens.

An item is what fills a slot: an expert, or one replica of it with the tokens that it serves, or nothing (an empty
slot). I items, G groups (ranks), s slots of a group, P parents (nodes), W words of 64 tokens. For each group two sets
are kept: the tokens with any item there, and those with exactly one. A swap's change of fan-out is then four
popcounts a word, and nothing is approximated. Energy, in tokens:

    group_weight * (sum over tokens of groups visited) + parent_weight * (... of parents visited)
    + penalty * T * sum over groups of max(0, load / allowed - 1)
"""

from __future__ import annotations

import numpy as np

from placement.compiled import compiled
from placement.rule.replica_choice import popcount
from placement.search.swaps.bitsets import count_bits
from placement.xorshift import next_random, random_below, random_unit

CLOSED = -2  # the expert of an item that stands for a slot that its group does not have


@compiled()
def collect_items(bits_IW: np.ndarray, items_s: np.ndarray, any_W: np.ndarray, one_W: np.ndarray) -> None:
    """Write the tokens that have any, and exactly one, of the items."""
    for w in range(bits_IW.shape[1]):
        any_w = np.uint64(0)
        two_w = np.uint64(0)
        for i in items_s:
            word = bits_IW[i, w]
            two_w |= any_w & word
            any_w |= word
        any_W[w] = any_w
        one_W[w] = any_w & ~two_w


@compiled()
def swap_delta(
    a_W: np.ndarray, b_W: np.ndarray, any_p_W: np.ndarray, one_p_W: np.ndarray, any_q_W: np.ndarray, one_q_W: np.ndarray
) -> int:
    """Change of (token, group) visits when item a of group p and item b of group q change places."""
    delta = np.int64(0)
    for w in range(len(a_W)):
        a = a_W[w] & ~b_W[w]
        b = b_W[w] & ~a_W[w]
        delta += popcount(np.int64(a & ~any_q_W[w])) - popcount(np.int64(a & one_p_W[w]))
        delta += popcount(np.int64(b & ~any_p_W[w])) - popcount(np.int64(b & one_q_W[w]))
    return int(delta)


@compiled()
def holds(items_s: np.ndarray, expert_I: np.ndarray, expert: int, other_than: int) -> bool:
    for i in items_s:  # noqa: SIM110
        if i != other_than and expert_I[i] == expert:
            return True
    return False


@compiled()
def parent_holds(
    items_Gs: np.ndarray, parent_G: np.ndarray, expert_I: np.ndarray, parent: int, expert: int, other_than: int
) -> bool:
    for g in range(len(parent_G)):  # noqa: SIM110
        if parent_G[g] == parent and holds(items_Gs[g], expert_I, expert, other_than):
            return True
    return False


@compiled()
def anneal_swaps(
    bits_IW: np.ndarray,
    load_I: np.ndarray,
    expert_I: np.ndarray,
    items_Gs: np.ndarray,
    group_I: np.ndarray,
    parent_G: np.ndarray,
    allowed_G: np.ndarray,
    group_weight: float,
    parent_weight: float,
    within_parents: bool,
    spread_parents: bool,
    num_tokens: int,
    penalty_from: float,
    penalty_to: float,
    heat_from: float,
    heat_to: float,
    begin: float,
    end: float,
    iterations: int,
    state_1: np.ndarray,
    best_items_Gs: np.ndarray,
    best_2: np.ndarray,
) -> None:
    """Run `iterations` proposals of the part `begin` to `end` (fractions) of an annealing schedule.

    `bits_IW` uint64, `load_I` float64, `expert_I` int32 (-1 an empty slot, -2 no slot at all: never moved), `items_Gs`
    int32 the item in each slot, `group_I` int32, `parent_G` int32, `allowed_G` float64 the load that a group may have.

    Heat (in tokens) and penalty follow a geometric schedule. The best state met goes to `best_items_Gs`, its excess
    load (sum over groups of load / allowed - 1 where above) and its weighted visits to `best_2`: less excess is
    better, then fewer visits. `within_parents` keeps items in their parent; `spread_parents` keeps the copies of an
    expert on different parents. `items_Gs`, `group_I` and `state_1` are advanced.
    """
    num_items, num_words = bits_IW.shape
    num_groups, num_slots = items_Gs.shape
    num_parents = 0
    for g in range(num_groups):
        num_parents = max(num_parents, parent_G[g] + 1)
    any_GW = np.empty((num_groups, num_words), np.uint64)
    one_GW = np.empty((num_groups, num_words), np.uint64)
    any_PW = np.empty((num_parents, num_words), np.uint64)
    one_PW = np.empty((num_parents, num_words), np.uint64)
    groups_of_parent = num_groups // num_parents
    load_G = np.zeros(num_groups)
    visits = 0.0
    for g in range(num_groups):
        collect_items(bits_IW, items_Gs[g], any_GW[g], one_GW[g])
        visits += group_weight * count_bits(any_GW[g])
        for i in items_Gs[g]:
            load_G[g] += load_I[i]
    two_levels = parent_weight > 0 and num_parents > 1 and not within_parents
    if two_levels:
        for n in range(num_parents):
            first = n * groups_of_parent
            collect_items(bits_IW, items_Gs[first : first + groups_of_parent].ravel(), any_PW[n], one_PW[n])
            visits += parent_weight * count_bits(any_PW[n])
    excess = 0.0
    for g in range(num_groups):
        excess += max(0.0, load_G[g] / allowed_G[g] - 1)

    for step in range(iterations):
        if step % 64 == 0:
            part = begin + (end - begin) * step / iterations
            heat = heat_from * (heat_to / heat_from) ** part
            penalty = num_tokens * penalty_from * (penalty_to / penalty_from) ** part
        a = random_below(state_1, num_items)
        p = group_I[a]
        if within_parents:
            q = parent_G[p] * groups_of_parent + random_below(state_1, groups_of_parent)
        else:
            q = random_below(state_1, num_groups)
        slot_q = random_below(state_1, num_slots)
        if p == q:
            continue
        b = items_Gs[q, slot_q]
        expert_a, expert_b = expert_I[a], expert_I[b]
        if expert_a == expert_b or min(expert_a, expert_b) == CLOSED:
            continue
        moved = load_I[a] - load_I[b]
        new_excess = (
            excess
            - max(0.0, load_G[p] / allowed_G[p] - 1)
            - max(0.0, load_G[q] / allowed_G[q] - 1)
            + max(0.0, (load_G[p] - moved) / allowed_G[p] - 1)
            + max(0.0, (load_G[q] + moved) / allowed_G[q] - 1)
        )
        limit = -heat * np.log(random_unit(state_1)) - penalty * (new_excess - excess)
        # A swap of two items saves at most the visits of all their tokens.
        if limit < -2.0 * num_tokens * (group_weight + parent_weight):
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
        delta = 0.0
        if group_weight > 0:
            delta = group_weight * swap_delta(bits_IW[a], bits_IW[b], any_GW[p], one_GW[p], any_GW[q], one_GW[q])
        if two_levels and crosses:
            m, n = parent_G[p], parent_G[q]
            delta += parent_weight * swap_delta(bits_IW[a], bits_IW[b], any_PW[m], one_PW[m], any_PW[n], one_PW[n])
        if delta > limit:
            continue

        for i in range(num_slots):
            if items_Gs[p, i] == a:
                items_Gs[p, i] = b
        items_Gs[q, slot_q] = a
        group_I[a], group_I[b] = q, p
        load_G[p] -= moved
        load_G[q] += moved
        collect_items(bits_IW, items_Gs[p], any_GW[p], one_GW[p])
        collect_items(bits_IW, items_Gs[q], any_GW[q], one_GW[q])
        if two_levels and crosses:
            for n in (parent_G[p], parent_G[q]):
                first = n * groups_of_parent
                collect_items(bits_IW, items_Gs[first : first + groups_of_parent].ravel(), any_PW[n], one_PW[n])
        visits += delta
        excess = new_excess
        if excess < best_2[0] - 1e-9 or (excess < best_2[0] + 1e-9 and visits < best_2[1] - 1e-9):
            best_2[0], best_2[1] = excess, visits
            best_items_Gs[:] = items_Gs
    next_random(state_1)
