"""Small repairs of a placement in use: few moves, fast enough to run all the time.

T tokens, E experts, R ranks, s slots of a rank, I items, W words of tokens, L layers. Steepest descent from the
placement as it stands: the rank furthest above its limit gives the item whose exchange brings most, load first, fan-out
where that allows; an expert that is too hot for any rank gets another copy in the place of one that is spare.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from placement.bitsets import assigned_token_bits, random_below, random_state, token_bits
from placement.problem import LayerProblem, load_guard, slot_table
from placement.replica_choice import choose_replicas
from placement.replica_search import CLOSED, _add_holder, _has_holder, _remove_holder, _spread
from placement.swap_search import _collect, _holds, _parent_holds, _swap_delta
from placement.tables import Placement
from placement.trace import ActivationTrace

EXCESS_WEIGHT = 30.0  # of a unit of load above the limit, in visits a token
WINDOW_TOKENS = 2000  # sampled tokens that a refresh looks at: enough to see loads, few enough to be fast
MIN_GAIN = 0.004  # visits a token that a swap must save to be worth two copies of an expert


@njit(nogil=True, cache=True)
def _excess_of(load: float, allowed: float) -> float:
    return max(0.0, load / allowed - 1)


@njit(nogil=True, cache=True)
def repair_replicas(
    load_E: np.ndarray,
    experts_Rs: np.ndarray,
    node_of_rank_R: np.ndarray,
    num_nodes: int,
    allowed_R: np.ndarray,
    min_copies: int,
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
                _add_holder(holders_ER, num_holders_E, experts_Rs[r, i], r)
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
                if _has_holder(holders_ER, num_holders_E, a, q):
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
                        _remove_holder(holders_ER, num_holders_E, b, q)
                        legal = _spread(holders_ER, num_holders_E, b, node_of_rank_R, num_nodes) >= min_copies
                        _add_holder(holders_ER, num_holders_E, b, q)
                        if not legal:
                            continue
                    best, best_a, best_q, best_j = total, a, q, j
        if best_a < 0:
            break
        b = experts_Rs[best_q, best_j]
        for e in (best_a, b):
            if e >= 0:
                for h in range(num_holders_E[e]):
                    load_R[holders_ER[e, h]] -= load_E[e] / num_holders_E[e]
        if b >= 0:
            _remove_holder(holders_ER, num_holders_E, b, best_q)
        _add_holder(holders_ER, num_holders_E, best_a, best_q)
        for e in (best_a, b):
            if e >= 0:
                for h in range(num_holders_E[e]):
                    load_R[holders_ER[e, h]] += load_E[e] / num_holders_E[e]
        experts_Rs[best_q, best_j] = best_a
        moves += 1
    return moves


@njit(nogil=True, cache=True)
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
        _collect(bits_IW, items_Gs[g], any_GW[g], one_GW[g])
    two_levels = num_parents > 1 and parent_weight > 0
    if two_levels:
        for n in range(num_parents):
            _collect(bits_IW, items_Gs[n * per_parent : (n + 1) * per_parent].ravel(), any_PW[n], one_PW[n])
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
            change += _swap_delta(bits_IW[a], bits_IW[b], any_GW[p], one_GW[p], any_GW[q], one_GW[q])
            if crosses:
                m, n = parent_G[p], parent_G[q]
                change += parent_weight * _swap_delta(
                    bits_IW[a], bits_IW[b], any_PW[m], one_PW[m], any_PW[n], one_PW[n]
                )
            if change >= best:
                continue
            if (expert_a >= 0 and _holds(items_Gs[q], expert_I, expert_a, b)) or (
                expert_b >= 0 and _holds(items_Gs[p], expert_I, expert_b, a)
            ):
                continue
            if (
                spread_parents
                and parent_G[p] != parent_G[q]
                and (
                    (expert_a >= 0 and _parent_holds(items_Gs, parent_G, expert_I, parent_G[q], expert_a, b))
                    or (expert_b >= 0 and _parent_holds(items_Gs, parent_G, expert_I, parent_G[p], expert_b, a))
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
            _collect(bits_IW, items_Gs[g], any_GW[g], one_GW[g])
        if two_levels and parent_G[p] != parent_G[q]:
            for n in (parent_G[p], parent_G[q]):
                _collect(bits_IW, items_Gs[n * per_parent : (n + 1) * per_parent].ravel(), any_PW[n], one_PW[n])
    return moves


def bounded_moves(problem: LayerProblem, given_Rs: np.ndarray, max_moves: int, proposals: int = 20_000) -> np.ndarray:
    """Slots int32 [R, s] that differ from `given_Rs` by at most `max_moves` experts on ranks that lacked them."""
    return _refresh_slots(problem, given_Rs, max_moves, proposals, random_state(len(problem.load), max_moves))


def _refresh_slots(
    problem: LayerProblem, given_Rs: np.ndarray, max_moves: int, proposals: int, state_1: np.ndarray
) -> np.ndarray:
    slots_Rs = np.ascontiguousarray(given_Rs, dtype=np.int32).copy()
    moves = 0
    if (slots_Rs >= 0).sum() > problem.num_experts or (slots_Rs == -1).any():
        moves = repair_replicas(
            problem.load, slots_Rs, problem.node_of_rank, problem.num_nodes, problem.allowed, problem.min_copies,
            max_moves,
        )  # fmt: skip
    flat_I = slots_Rs.ravel()
    items_Rs = np.arange(slots_Rs.size, dtype=np.int32).reshape(slots_Rs.shape)
    held = flat_I >= 0
    load_I = np.zeros(slots_Rs.size)
    single = int(held.sum()) == problem.num_experts
    if single or not problem.num_tokens:
        bits_IW = np.zeros((slots_Rs.size, (problem.num_tokens + 63) // 64), np.uint64)
        bits_IW[held] = token_bits(problem.ids, problem.num_experts)[flat_I[held]]
    else:
        rank_TK = np.empty(problem.ids.shape, np.int32)
        table_ER = slot_table(slots_Rs, problem.num_experts)
        choose_replicas(
            problem.ids,
            table_ER,
            problem.node_of_rank,
            problem.num_nodes,
            np.zeros(problem.num_ranks, np.int64),
            rank_TK,
        )
        bits_IW = assigned_token_bits(problem.ids, rank_TK, table_ER, slots_Rs.size)
    if single:
        load_I[held] = problem.load[flat_I[held]]
    else:
        # An even share of the true load: the rule shares the window's tokens, but ties make up for small differences.
        count_E = np.bincount(flat_I[held], minlength=problem.num_experts)
        load_I[held] = (problem.load / np.maximum(count_E, 1))[flat_I[held]]
    descend_swaps(
        bits_IW, load_I, flat_I.copy(), items_Rs, problem.node_of_rank, problem.allowed, problem.weight_of_node,
        EXCESS_WEIGHT * max(problem.num_tokens, 1), problem.min_copies > 1, max_moves - moves, proposals,
        MIN_GAIN * max(problem.num_tokens, 1), state_1,
    )  # fmt: skip
    return keep_slots(given_Rs, flat_I[items_Rs])


def keep_slots(old_Rs: np.ndarray, new_Rs: np.ndarray) -> np.ndarray:
    """`new_Rs` with every expert that stays on its rank back in its old slot; int32 [R, s] all."""
    result_Rs = new_Rs.copy()
    for rank in np.flatnonzero((old_Rs != new_Rs).any(1)):
        arriving = [e for e in new_Rs[rank].tolist() if e >= 0 and e not in set(old_Rs[rank].tolist())]
        staying = set(new_Rs[rank].tolist())
        for slot, old in enumerate(old_Rs[rank].tolist()):
            if old == CLOSED or (old >= 0 and old in staying):
                result_Rs[rank, slot] = old
                staying.discard(old)
            else:
                result_Rs[rank, slot] = arriving.pop(0) if arriving else -1
    return result_Rs


def refresh(
    placement: Placement,
    window: ActivationTrace,
    load_cap: float = 1.05,
    max_moves: int = 16,
    min_replicas: int = 1,
    node_weight: float = 4.0,
    proposals: int = 1000,
    speeds: tuple[float, ...] | None = None,
    seed: int = 0,
) -> Placement:
    """A placement that suits a window of recent tokens, at most `max_moves` expert copies a layer away from this one.

    Meant to run all the time: some 100 ms for 58 layers of 256 experts on 64 ranks, on one core. Looks at
    `WINDOW_TOKENS` tokens at most; loads come from the window's counts where they are of the same tokens. Slots that
    are empty in every layer of a rank stay so. Raises ValueError if the window is of another model.
    """
    if (window.num_layers, window.num_experts) != (placement.num_layers, placement.num_experts):
        raise ValueError(
            f"the window has {window.num_layers} layers of {window.num_experts} experts, the placement "
            f"{placement.num_layers} of {placement.num_experts}"
        )
    load_LE = window.load()
    ids_LTK = np.ascontiguousarray(window.topk_ids[:WINDOW_TOKENS].transpose(1, 0, 2), dtype=np.int32)
    map_LRs = placement.physical_to_logical_map.reshape(placement.num_layers, placement.num_ranks, -1)
    usable_R = (map_LRs >= 0).any((0, 2)).astype(float) * np.asarray(speeds or (1.0,) * placement.num_ranks)
    pairs = max(float(load_LE[0].sum()), 1.0)
    has_replicas = bool((placement.logical_replica_count > 1).any())
    cap = load_cap - load_guard(load_cap, int(pairs), 1, placement.num_ranks, has_replicas)
    state_1 = random_state(seed)
    rows = []
    for layer in range(placement.num_layers):
        target_R = np.maximum(load_LE[layer].sum() * usable_R / usable_R.sum(), 1e-9)
        given_Rs = np.where(usable_R[:, None] > 0, map_LRs[layer], CLOSED)
        problem = LayerProblem(
            ids=ids_LTK[layer],
            load=load_LE[layer],
            pair_weight=np.ones(placement.num_experts),
            open_slots=np.full(placement.num_ranks, placement.slots_per_rank),
            node_of_rank=placement.node_of_rank_R,
            num_nodes=placement.num_nodes,
            node_weight=node_weight,
            min_copies=min_replicas,
            max_filled=placement.num_slots,
            target=target_R,
            allowed=target_R * cap,
        )
        slots_Rs = _refresh_slots(problem, given_Rs, max_moves, proposals, state_1)
        rows.append(np.where(slots_Rs >= 0, slots_Rs, -1).ravel())
    return Placement(placement.num_ranks, placement.num_nodes, placement.num_experts, np.stack(rows))
