"""Small repairs of a layer in use: few moves, fast enough to run all the time.

A hot expert gets another replica in the place of a spare one. Annealing then evens out loads with few moves. Moves that
are left go where they save most visits.

T tokens, K experts of one, E experts, R ranks, s slots of a rank, I items, M mixes of the traffic.
"""

from __future__ import annotations

import numpy as np

from placement.compiled import compiled
from placement.placement import EMPTY
from placement.rule.replica_choice import choose_replicas
from placement.search.problem import LayerProblem
from placement.search.replicas.holders import CLOSED
from placement.search.scoring import slot_table
from placement.search.swaps.bitsets import assigned_token_bits, token_bits
from placement.search.swaps.descent import descend_swaps
from placement.search.swaps.few_moves import Prices, anneal_few_moves
from placement.search.swaps.spare_replicas import repair_replicas
from placement.search.swaps.state import Items
from placement.search.swaps.swap_stages import rank_groups
from placement.xorshift import random_state

EXCESS_WEIGHT = 30.0  # cost of one allowed load above the limit, in visits a token
MIN_GAIN = 0.04  # visits a token that a swap must save to be worth copying two experts
HEAT = (0.1, 0.01)  # from and to, in visits a token
LAYER_PROPOSALS = 24_000  # of the annealing, at most
RULE_SHARE = 0.5  # how much of a replica's load follows from the window's tokens; the rest is an even split


def bounded_moves(problem: LayerProblem, given_Rs: np.ndarray, max_moves: int, proposals: int = 20_000) -> np.ndarray:
    """Slots int32 [R, s] in which ranks hold at most `max_moves` experts that they do not hold in `given_Rs`."""
    return repaired_slots(problem, given_Rs, max_moves, proposals, random_state(len(problem.load), max_moves))


def repaired_slots(
    problem: LayerProblem,
    given_Rs: np.ndarray,
    max_moves: int,
    proposals: int,
    random_1: np.ndarray,
    annealing: int = LAYER_PROPOSALS,
) -> np.ndarray:
    """Slots int32 [R, s]: a spare replica makes way for a hot expert, then swaps of few experts, then single swaps."""
    slots_Rs = np.ascontiguousarray(given_Rs, dtype=np.int32).copy()
    moves = 0
    if (slots_Rs >= 0).sum() > problem.num_experts or (slots_Rs == EMPTY).any():
        moves = repair_replicas(problem.load, slots_Rs, problem.nodes, problem.allowed, problem.min_replicas, max_moves)
    items = _window_items(problem, slots_Rs)
    groups = rank_groups(problem)
    tokens = max(problem.num_tokens, 1)
    prices = Prices(EXCESS_WEIGHT * tokens, MIN_GAIN / 2 * tokens, HEAT[0] * tokens, HEAT[1] * tokens)
    item_Rs = np.arange(slots_Rs.size, dtype=np.int32).reshape(slots_Rs.shape)
    moves += anneal_few_moves(items, groups, prices, item_Rs, max_moves - moves, annealing, random_1)
    descend_swaps(
        items, groups, prices.excess_weight, MIN_GAIN * tokens, item_Rs, max_moves - moves, proposals, random_1
    )
    return keep_slots(given_Rs, items.expert_I[item_Rs])


def _window_items(problem: LayerProblem, slots_Rs: np.ndarray) -> Items:
    """Slots as items of the swap searches, with loads that an even split and the window's tokens suggest."""
    flat_I = slots_Rs.ravel()
    held = flat_I >= 0
    load_IM = np.zeros((slots_Rs.size, problem.num_mixes))
    single = int(held.sum()) == problem.num_experts
    if single or not problem.num_tokens:
        bits_IW = np.zeros((slots_Rs.size, (problem.num_tokens + 63) // 64), np.uint64)
        bits_IW[held] = token_bits(problem.ids, problem.num_experts)[flat_I[held]]
    else:
        rank_TK = np.empty(problem.ids.shape, np.int32)
        table_ER = slot_table(slots_Rs, problem.num_experts)
        load_R = np.zeros(problem.num_ranks, np.int64)
        choose_replicas(problem.ids, table_ER, problem.node_of_rank, problem.num_nodes, problem.work, load_R, rank_TK)
        bits_IW = assigned_token_bits(problem.ids, rank_TK, table_ER, slots_Rs.size)
    if single:
        load_IM[held] = problem.load_EM[flat_I[held]]
    else:
        # Between an even split and what the rule makes of the window: ties even out small differences, not all.
        count_E = np.bincount(flat_I[held], minlength=problem.num_experts)
        even_I = (1 / np.maximum(count_E, 1))[flat_I[held]]
        served_I = np.bitwise_count(bits_IW[held]).sum(1)
        served_E = np.bincount(flat_I[held], served_I, minlength=problem.num_experts)
        share_I = np.where(served_E[flat_I[held]] > 0, served_I / np.maximum(served_E[flat_I[held]], 1), even_I)
        part_I = RULE_SHARE * share_I + (1 - RULE_SHARE) * even_I
        load_IM[held] = problem.load_EM[flat_I[held]] * part_I[:, None]
    return Items(bits_IW, load_IM, flat_I.copy())


@compiled()
def keep_slots(old_Rs: np.ndarray, new_Rs: np.ndarray) -> np.ndarray:
    """`new_Rs` with every expert that stays on its rank back in its old slot. All arrays are int32 [R, s]."""
    num_ranks, num_slots = old_Rs.shape
    result_Rs = np.full_like(new_Rs, EMPTY)
    for r in range(num_ranks):
        settled = np.zeros(num_slots, np.bool_)
        for i in range(num_slots):
            if old_Rs[r, i] == CLOSED:
                result_Rs[r, i] = CLOSED
        for j in range(num_slots):
            if new_Rs[r, j] < 0:
                settled[j] = True
                continue
            for i in range(num_slots):
                if old_Rs[r, i] == new_Rs[r, j] and result_Rs[r, i] == EMPTY:
                    result_Rs[r, i] = new_Rs[r, j]
                    settled[j] = True
                    break
        i = 0
        for j in range(num_slots):
            if not settled[j]:
                while result_Rs[r, i] != EMPTY:
                    i += 1
                result_Rs[r, i] = new_Rs[r, j]
    return result_Rs
