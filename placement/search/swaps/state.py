"""The state that all swap searches share: where items stand, loads, and which tokens visit which group.

An item is what fills a slot: an expert, or one replica of it with the tokens it serves, or nothing (an empty slot). It
serves a fixed set of tokens. T tokens, I items, G groups (ranks), s slots of a group, P parents (nodes), W words of 64
tokens, M mixes of the traffic. For each group two sets are kept: the tokens with any item there, and those with exactly
one. A swap's change of fan-out is then four popcounts a word, and nothing is approximated.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from placement.compiled import compiled
from placement.rule.bits import popcount
from placement.search.annealing import excess_of
from placement.search.replicas.holders import CLOSED


class Items(NamedTuple):
    """What each item is; never changed.

    `bits_IW` uint64, its tokens; `load_IM` float64, its load in each mix; `expert_I` int32: -1 for an empty slot, -2
    for a slot that its group does not have, which never moves.
    """

    bits_IW: np.ndarray
    load_IM: np.ndarray
    expert_I: np.ndarray


class Groups(NamedTuple):
    """What items are swapped between; parents are groups of equally many groups, in order.

    `parent_G` int32; `allowed_GM` float64, largest loads; `parent_weight`, what visiting a parent costs, in visited
    groups; `spread_parents`: the replicas of an expert must stand on different parents, not just groups.
    """

    parent_G: np.ndarray
    allowed_GM: np.ndarray
    parent_weight: float
    spread_parents: bool


class TokenSets(NamedTuple):
    """Tokens with any item of a group (or parent), and with exactly one: uint64."""

    any_GW: np.ndarray
    one_GW: np.ndarray


class SwapState(NamedTuple):
    """What swaps change. `item_Gs` int32, the item in each slot; `group_I` int32; `load_GM` float64.

    `parents` has no rows where parents cost nothing or there is only one.
    """

    item_Gs: np.ndarray
    group_I: np.ndarray
    load_GM: np.ndarray
    groups: TokenSets
    parents: TokenSets


@compiled(forceinline=True)
def collect_items(bits_IW: np.ndarray, item_s: np.ndarray, any_W: np.ndarray, one_W: np.ndarray) -> None:
    """Write the tokens that have any, and exactly one, of the items."""
    for w in range(bits_IW.shape[1]):
        any_w = np.uint64(0)
        two_w = np.uint64(0)
        for i in item_s:
            word = bits_IW[i, w]
            two_w |= any_w & word
            any_w |= word
        any_W[w] = any_w
        one_W[w] = any_w & ~two_w


@compiled(forceinline=True)
def _collect_parent(items: Items, state: SwapState, parent: int) -> None:
    per_parent = len(state.load_GM) // len(state.parents.any_GW)
    item_N = state.item_Gs[parent * per_parent : (parent + 1) * per_parent].ravel()
    collect_items(items.bits_IW, item_N, state.parents.any_GW[parent], state.parents.one_GW[parent])


@compiled(forceinline=True)
def swap_state(items: Items, groups: Groups, item_Gs: np.ndarray) -> SwapState:
    """The state of items in slots int32 [G, s], an array that swaps will change."""
    num_groups, num_words = len(item_Gs), items.bits_IW.shape[1]
    num_parents = groups.parent_G.max() + 1
    if num_parents == 1 or groups.parent_weight <= 0:
        num_parents = 0
    state = SwapState(
        item_Gs,
        np.zeros(len(items.load_IM), np.int32),
        np.zeros((num_groups, items.load_IM.shape[1])),
        TokenSets(np.empty((num_groups, num_words), np.uint64), np.empty((num_groups, num_words), np.uint64)),
        TokenSets(np.empty((num_parents, num_words), np.uint64), np.empty((num_parents, num_words), np.uint64)),
    )
    for g in range(num_groups):
        collect_items(items.bits_IW, item_Gs[g], state.groups.any_GW[g], state.groups.one_GW[g])
        for i in item_Gs[g]:
            state.group_I[i] = g
            for m in range(items.load_IM.shape[1]):
                state.load_GM[g, m] += items.load_IM[i, m]
    for n in range(num_parents):
        _collect_parent(items, state, n)
    return state


@compiled(forceinline=True)
def _count_bits(bits_W: np.ndarray) -> int:
    total = np.int64(0)
    for w in range(len(bits_W)):
        total += popcount(np.int64(bits_W[w]))
    return int(total)


@compiled(forceinline=True)
def weighted_visits(groups: Groups, state: SwapState) -> float:
    """Groups that tokens visit, and `parent_weight` times the parents, summed over tokens."""
    visits = 0.0
    for g in range(len(state.groups.any_GW)):
        visits += _count_bits(state.groups.any_GW[g])
    for n in range(len(state.parents.any_GW)):
        visits += groups.parent_weight * _count_bits(state.parents.any_GW[n])
    return visits


@compiled(forceinline=True)
def _swap_delta(
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


@compiled(forceinline=True)
def add_visits(energy: float, items: Items, groups: Groups, state: SwapState, a: int, b: int) -> float:
    """`energy` plus the change of weighted visits when items a and b change places."""
    p, q = state.group_I[a], state.group_I[b]
    any_GW, one_GW = state.groups.any_GW, state.groups.one_GW
    a_W, b_W = items.bits_IW[a], items.bits_IW[b]
    energy += _swap_delta(a_W, b_W, any_GW[p], one_GW[p], any_GW[q], one_GW[q])
    m, n = groups.parent_G[p], groups.parent_G[q]
    any_PW, one_PW = state.parents.any_GW, state.parents.one_GW
    if len(any_PW) > 0 and m != n:
        energy += groups.parent_weight * _swap_delta(a_W, b_W, any_PW[m], one_PW[m], any_PW[n], one_PW[n])
    return energy


@compiled(forceinline=True)
def excess_change(items: Items, groups: Groups, state: SwapState, a: int, b: int) -> float:
    """Change of excess load, summed over mixes, when two items change places."""
    load_GM, allowed_GM, load_IM = state.load_GM, groups.allowed_GM, items.load_IM
    p, q = state.group_I[a], state.group_I[b]
    change = 0.0
    for m in range(load_IM.shape[1]):
        moved = load_IM[a, m] - load_IM[b, m]
        change += (
            excess_of(load_GM[p, m] - moved, allowed_GM[p, m])
            + excess_of(load_GM[q, m] + moved, allowed_GM[q, m])
            - excess_of(load_GM[p, m], allowed_GM[p, m])
            - excess_of(load_GM[q, m], allowed_GM[q, m])
        )
    return change


@compiled(forceinline=True)
def differ(items: Items, state: SwapState, a: int, b: int) -> bool:
    """Whether a swap of two items would change anything, and both slots exist."""
    expert_a, expert_b = items.expert_I[a], items.expert_I[b]
    return bool(state.group_I[a] != state.group_I[b] and expert_a != expert_b and min(expert_a, expert_b) != CLOSED)


@compiled(forceinline=True)
def _group_holds(items: Items, item_s: np.ndarray, expert: int, other_than: int) -> bool:
    for i in item_s:  # noqa: SIM110
        if i != other_than and items.expert_I[i] == expert:
            return True
    return False


@compiled(forceinline=True)
def _may_enter(items: Items, groups: Groups, state: SwapState, a: int, b: int) -> bool:
    """Whether item a may take the place of item b: no other replica of its expert is in the group or, if they must be
    spread, in another parent that it would enter."""
    expert, p, q = items.expert_I[a], state.group_I[a], state.group_I[b]
    if expert < 0:
        return True
    if _group_holds(items, state.item_Gs[q], expert, b):
        return False
    parent = groups.parent_G[q]
    if groups.spread_parents and groups.parent_G[p] != parent:
        for g in range(len(groups.parent_G)):
            if groups.parent_G[g] == parent and _group_holds(items, state.item_Gs[g], expert, b):
                return False
    return True


@compiled(forceinline=True)
def is_legal_swap(items: Items, groups: Groups, state: SwapState, a: int, b: int) -> bool:
    """Whether a swap keeps the replicas of an expert on different groups, or parents."""
    return _may_enter(items, groups, state, a, b) and _may_enter(items, groups, state, b, a)


@compiled(forceinline=True)
def swap_items(items: Items, groups: Groups, state: SwapState, a: int, b: int) -> None:
    """Let two items of different groups change places."""
    item_Gs, group_I, load_GM = state.item_Gs, state.group_I, state.load_GM
    p, q = group_I[a], group_I[b]
    for i in range(item_Gs.shape[1]):
        if item_Gs[p, i] == a:
            item_Gs[p, i] = b
        if item_Gs[q, i] == b:
            item_Gs[q, i] = a
    group_I[a], group_I[b] = q, p
    for m in range(items.load_IM.shape[1]):
        moved = items.load_IM[a, m] - items.load_IM[b, m]
        load_GM[p, m] -= moved
        load_GM[q, m] += moved
    for g in (p, q):
        collect_items(items.bits_IW, item_Gs[g], state.groups.any_GW[g], state.groups.one_GW[g])
    if len(state.parents.any_GW) > 0 and groups.parent_G[p] != groups.parent_G[q]:
        for n in (groups.parent_G[p], groups.parent_G[q]):
            _collect_parent(items, state, n)
