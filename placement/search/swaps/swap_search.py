"""Annealing by swaps on fan-out itself, over bit sets of tokens. Energy, in tokens:

    sum over tokens of (groups visited + parent_weight * parents visited)
    + penalty * T * sum over groups and mixes of max(0, load / allowed - 1)

T tokens, I items, G groups (ranks), s slots of a group; see `placement.search.swaps.state`.
"""

from __future__ import annotations

import numpy as np

from placement.compiled import compiled
from placement.search.annealing import Best, Schedule, heat_and_penalty, keep_best, total_excess
from placement.search.swaps.state import (
    Groups,
    Items,
    add_visits,
    differ,
    excess_change,
    is_legal_swap,
    swap_items,
    swap_state,
    weighted_visits,
)
from placement.xorshift import next_random, random_below, random_unit

COOLING_STEPS = 64  # proposals between two changes of heat and penalty


@compiled()
def anneal_swaps(
    items: Items,
    groups: Groups,
    within_parents: bool,
    schedule: Schedule,
    num_tokens: int,
    item_Gs: np.ndarray,
    best: Best,
    random_1: np.ndarray,
) -> None:
    """Run one part of an annealing schedule.

    `item_Gs` int32, the item in each slot, and `random_1` are advanced; `best` gets the best slots met by swaps.
    `within_parents` keeps items in their parent.
    """
    state = swap_state(items, groups, item_Gs)
    parent_G = groups.parent_G
    num_groups, num_slots = item_Gs.shape
    groups_of_parent = num_groups // (parent_G.max() + 1)
    visits = weighted_visits(groups, state)
    excess = total_excess(state.load_GM, groups.allowed_GM)
    heat, penalty = 0.0, 0.0
    for step in range(schedule.iterations):
        if step % COOLING_STEPS == 0:
            heat, penalty = heat_and_penalty(schedule, step, num_tokens)
        a = random_below(random_1, len(items.load_IM))
        p = state.group_I[a]
        if within_parents:
            q = parent_G[p] * groups_of_parent + random_below(random_1, groups_of_parent)
        else:
            q = random_below(random_1, num_groups)
        b = item_Gs[q, random_below(random_1, num_slots)]
        if not differ(items, state, a, b):
            continue
        new_excess = excess + excess_change(items, groups, state, a, b)
        limit = -heat * np.log(random_unit(random_1)) - penalty * (new_excess - excess)
        # A swap of two items saves at most the visits of all their tokens.
        if limit < -2.0 * num_tokens * (1.0 + groups.parent_weight) or not is_legal_swap(items, groups, state, a, b):
            continue
        change = add_visits(0.0, items, groups, state, a, b)
        if change > limit:
            continue
        swap_items(items, groups, state, a, b)
        visits += change
        excess = new_excess
        keep_best(best, item_Gs, excess, visits)
    next_random(random_1)
