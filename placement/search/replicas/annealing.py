"""Annealing of slots with replicas, judged by what the rule for choosing replicas makes of every move.

A move changes one or two slots. Only tokens that want the experts in them are covered again, by the very code that
routers run (`cover_token`). Most moves are bad and are given up after a few dozen of those tokens. Energy, in tokens:

    sum over tokens of (ranks visited + node_weight * nodes visited)
    + penalty * T * sum over ranks of max(0, load / allowed - 1)

Where routers prefer local replicas, each token's router has its own holders and counts its own loads, and `node_weight`
is paid for ranks visited on other nodes instead. Copies that the placement in use would need count as visits.
P (token, expert) pairs, E experts, R ranks, M mixes.
"""

from __future__ import annotations

import numpy as np

from placement.compiled import compiled
from placement.rule.replica_choice import Holders, Nodes
from placement.search.annealing import (
    EXCESS_TOLERANCE,
    Best,
    Schedule,
    excess_of,
    fullest,
    heat_and_penalty,
    keep_best,
    total_excess,
)
from placement.search.replicas.holders import RouterHolders, update_local_holders
from placement.search.replicas.moves import (
    Move,
    SwapChance,
    keeps_spread,
    move_holders,
    move_slots,
    propose_move,
    propose_return,
    restore_holders,
)
from placement.search.replicas.state import Limits, State, Tokens, accept_trial, all_holders, cover_all, cover_rows
from placement.xorshift import random_below, random_unit

HALF_OF_MOVES = SwapChance(0, 1, 2)
FIRST_LOOK = 48  # tokens covered again before a move is first judged; doubled each time
HOT_RANK_DRAWS = 4  # one in so many moves starts from the fullest rank while one is above its limit
RETURN_DRAWS = 2  # where copies cost something, one in so many moves undoes one
COOLING_STEPS = 16  # proposals between two changes of heat and penalty


@compiled()
def anneal_replicas(
    tokens: Tokens, limits: Limits, schedule: Schedule, state: State, best: Best, random_1: np.ndarray
) -> None:
    """Run one part of an annealing schedule.

    `state` and `random_1` are advanced; everything but the slots is computed again at the start. `best` gets the best
    slots met, the start among them; loads up to `EXCESS_TOLERANCE` above the limits count as within.
    """
    filled, visits = cover_all(tokens, limits, state)
    visits += _cost_of_copies(limits, state.experts_Rs)
    experts_Rs, routers, covering, trial = state.experts_Rs, state.routers, state.covering, state.trial
    holders, start_E = all_holders(routers), tokens.start_E
    load_RM, load_ERM, trial_load_RM = covering.load_RM, covering.load_ERM, trial.load_RM
    nodes, node_weight, allowed_RM = limits.nodes, limits.node_weight, limits.allowed_RM
    excess = total_excess(load_RM, allowed_RM)
    keep_best(best, experts_Rs, max(0.0, excess - EXCESS_TOLERANCE), visits)
    heat, penalty = 0.0, 0.0
    for step in range(schedule.iterations):
        if step % COOLING_STEPS == 0:
            heat, penalty = heat_and_penalty(schedule, step, len(covering.visits_T))
        rank = random_below(random_1, len(load_RM))
        if excess > 0 and random_below(random_1, HOT_RANK_DRAWS) == 0:
            rank = fullest(load_RM, allowed_RM, rank)
        num_free = limits.max_filled - filled
        if limits.copy_cost > 0 and random_below(random_1, RETURN_DRAWS) == 0:
            move = propose_return(rank, experts_Rs, holders, limits.home_ER, num_free, random_1)
        else:
            move = propose_move(rank, experts_Rs, holders, num_free, HALF_OF_MOVES, random_1)
        if move.rank < 0:
            continue
        price = _price_of_move(limits, move)
        threshold = -heat * np.log(random_unit(random_1)) - price
        # Most moves above the limits need no look at tokens.
        likely_excess = _likely_excess(load_RM, load_ERM, allowed_RM, holders, move, excess)
        likely_limit = threshold - 0.5 * penalty * (likely_excess - excess)
        if likely_limit < -0.5 * (1 + node_weight) * _num_wanting(start_E, move):
            continue

        # Routers choose from the new holders; slots stay until the move is accepted.
        move_holders(holders, move)
        _update_routers(routers, nodes, move)
        accepted, rows, change = False, -1, 0.0
        if keeps_spread(holders, move, nodes, limits.min_replicas):
            rows, change = _cover_trial(tokens, limits, state, move, likely_limit)
        new_excess = excess
        if rows >= 0:
            new_excess = total_excess(trial_load_RM, allowed_RM)
            accepted = change <= threshold - penalty * (new_excess - excess)
        if not accepted:
            restore_holders(holders, move)
            _update_routers(routers, nodes, move)
            continue
        accept_trial(tokens, covering, trial, rows)
        filled += move_slots(experts_Rs, move)
        visits += change + price
        excess = new_excess
        keep_best(best, experts_Rs, max(0.0, excess - EXCESS_TOLERANCE), visits)


@compiled()
def _cost_of_copies(limits: Limits, experts_Rs: np.ndarray) -> float:
    cost = 0.0
    for r in range(experts_Rs.shape[0]):
        for expert in experts_Rs[r]:
            if expert >= 0 and not limits.home_ER[expert, r]:
                cost += limits.copy_cost
    return cost


@compiled(forceinline=True)
def _price_of_move(limits: Limits, move: Move) -> float:
    """What the copies of a move cost more than those that it makes needless."""
    home_ER, copies = limits.home_ER, 0
    for sign, rank in ((1, move.rank), (-1, move.other_rank)):
        if rank >= 0:
            if move.coming >= 0 and not home_ER[move.coming, rank]:
                copies += sign
            if move.leaving >= 0 and not home_ER[move.leaving, rank]:
                copies -= sign
    return copies * limits.copy_cost


@compiled(forceinline=True)
def _likely_excess(
    load_RM: np.ndarray, load_ERM: np.ndarray, allowed_RM: np.ndarray, holders: Holders, move: Move, excess: float
) -> float:
    """The excess load after a move if replicas keep their shares: an estimate from loads alone."""
    after = excess
    p, q = move.rank, move.other_rank
    for m in range(load_RM.shape[1]):
        gone, came = 0.0, 0.0
        if move.leaving >= 0:
            gone = load_ERM[move.leaving, p, m]
        if move.coming >= 0:
            if q >= 0:
                came = load_ERM[move.coming, q, m]
            else:
                count_E, rank_ER = holders.count_E, holders.rank_ER
                for h in range(count_E[move.coming]):
                    came += load_ERM[move.coming, rank_ER[move.coming, h], m]
                came /= count_E[move.coming] + 1
        after -= excess_of(load_RM[p, m], allowed_RM[p, m])
        after += excess_of(load_RM[p, m] - gone + came, allowed_RM[p, m])
        if q >= 0:
            after -= excess_of(load_RM[q, m], allowed_RM[q, m])
            after += excess_of(load_RM[q, m] + gone - came, allowed_RM[q, m])
    if q < 0 and move.coming >= 0:
        after = min(after, excess)
    return after


@compiled(forceinline=True)
def _num_wanting(start_E: np.ndarray, move: Move) -> int:
    """(token, expert) pairs of the experts of a move."""
    count = np.int64(0)
    for expert in (move.leaving, move.coming):
        if expert >= 0:
            count += start_E[expert + 1] - start_E[expert]
    return int(count)


@compiled(forceinline=True)
def _update_routers(routers: RouterHolders, nodes: Nodes, move: Move) -> None:
    for expert in (move.leaving, move.coming):
        if expert >= 0:
            update_local_holders(routers, expert, nodes)


@compiled()
def _cover_trial(tokens: Tokens, limits: Limits, state: State, move: Move, likely_limit: float) -> tuple[int, float]:
    """Cover the tokens that want an expert of the move again; returns how many, and the change of weighted visits.

    (-1, 0) if it is given up: after 48, 96, ... tokens the change of all of them is estimated, and a move that is two
    standard errors above `likely_limit` is not worth going on with.
    """
    trial, token_P, start_E = state.trial, tokens.token_P, tokens.start_E
    token_T = trial.token_T
    trial.pairs_QR[:] = state.covering.pairs_QR
    trial.load_RM[:] = state.covering.load_RM
    at_a, end_a, at_b, end_b = np.int64(0), np.int64(0), np.int64(0), np.int64(0)
    if move.leaving >= 0:
        at_a, end_a = start_E[move.leaving], start_E[move.leaving + 1]
    if move.coming >= 0:
        at_b, end_b = start_E[move.coming], start_E[move.coming + 1]
    total = (end_a - at_a) + (end_b - at_b)
    change, squares = 0.0, 0.0
    rows, next_look = 0, FIRST_LOOK
    while at_a < end_a or at_b < end_b:
        first = rows
        while rows < next_look and (at_a < end_a or at_b < end_b):
            # Merged by token, so that a token that wants both is covered once.
            if at_b >= end_b or (at_a < end_a and token_P[at_a] <= token_P[at_b]):
                t = token_P[at_a]
                if at_b < end_b and token_P[at_b] == t:
                    at_b += 1
                    total -= 1
                at_a += 1
            else:
                t = token_P[at_b]
                at_b += 1
            token_T[rows] = t
            rows += 1
        change, squares = cover_rows(tokens, limits, state, first, rows, change, squares)
        if rows == next_look:
            next_look *= 2
            scale = total / rows
            spread = np.sqrt(max(0.0, squares - change * change / rows)) * scale
            if change * scale - 2.0 * spread > likely_limit:
                return -1, 0.0
    return rows, change
