"""Annealing for balance alone: the least possible largest rank load when replicas share their expert's load evenly.

E experts, R ranks, s slots of a rank, M mixes of the traffic. Slots are int32 [R, s]: -1 is an empty slot, -2 one that
the rank does not have.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from placement.compiled import compiled
from placement.rule.replica_choice import Holders, Nodes
from placement.search.replicas.holders import even_split, holders_of
from placement.search.replicas.moves import (
    Move,
    SwapChance,
    keeps_spread,
    move_holders,
    move_slots,
    propose_move,
    restore_holders,
)
from placement.xorshift import random_below, random_state, random_unit

NORM = 16  # power of the mean that stands in for the maximum, smooth enough to search on
THREE_IN_FOUR = SwapChance(1, 4, 4)  # loads are evened out by swaps; how many replicas an expert has matters less often
HEATS = (0.01, 0.05)  # of restarts by turns: one stays near its start, one goes farther
LAST_HEAT = 2e-5
COOLING_STEPS = 64  # proposals between two changes of heat


class BalanceProblem(NamedTuple):
    """Loads to even out: `load_EM` and `target_RM`, the load of each rank in perfect balance, float64 of each mix.

    Every expert needs replicas on `min_replicas` different nodes; at most `max_filled` slots may hold an expert.
    """

    load_EM: np.ndarray
    target_RM: np.ndarray
    nodes: Nodes
    min_replicas: int
    max_filled: int


def best_balance(
    problem: BalanceProblem, start_Rs: np.ndarray, iterations: int, seed: int, restarts: int = 2
) -> tuple[np.ndarray, float]:
    """The best slots of several searches from `start_Rs`, and their `max(load / target)`; never worse than it."""
    best_Rs = start_Rs.copy()
    best = search_balance(problem, best_Rs, HEATS[0], 0, random_state(seed))
    for restart in range(restarts):
        slots_Rs = start_Rs.copy()
        heat = HEATS[restart % len(HEATS)]
        found = search_balance(problem, slots_Rs, heat, iterations, random_state(seed, restart))
        if found < best:
            best, best_Rs = found, slots_Rs
    return best_Rs, best


@compiled(forceinline=True)
def _power(x: float) -> float:
    x *= x
    x *= x
    x *= x
    return x * x


@compiled(forceinline=True)
def _largest(load_RM: np.ndarray, target_RM: np.ndarray) -> float:
    largest = 0.0
    for r in range(load_RM.shape[0]):
        for m in range(load_RM.shape[1]):
            largest = max(largest, load_RM[r, m] / target_RM[r, m])
    return largest


@compiled(forceinline=True)
def _energy(load_RM: np.ndarray, target_RM: np.ndarray) -> float:
    energy = 0.0
    for r in range(load_RM.shape[0]):
        for m in range(load_RM.shape[1]):
            energy += _power(load_RM[r, m] / target_RM[r, m])
    return energy


@compiled()
def search_balance(
    problem: BalanceProblem, experts_Rs: np.ndarray, heat_from: float, iterations: int, random_1: np.ndarray
) -> float:
    """Anneal `experts_Rs` towards the least `max(load / target)`; returns that of the best slots met, left there.

    Heat is in units of that quotient and ends at `LAST_HEAT`.
    """
    target_RM, num_ranks = problem.target_RM, len(problem.target_RM)
    holders = holders_of(experts_Rs, len(problem.load_EM))
    filled = holders.count_E.sum()
    load_RM = even_split(holders, problem.load_EM)
    energy = _energy(load_RM, target_RM)
    norm = energy ** (1.0 / NORM)
    best = _largest(load_RM, target_RM)
    best_experts_Rs = experts_Rs.copy()
    new_load_RM = load_RM.copy()
    heat = heat_from
    for step in range(iterations):
        if step % COOLING_STEPS == 0:
            heat = heat_from * (LAST_HEAT / heat_from) ** (step / iterations)
        rank = random_below(random_1, num_ranks)
        move = propose_move(rank, experts_Rs, holders, problem.max_filled - filled, THREE_IN_FOUR, random_1)
        if move.rank < 0:
            continue
        new_energy = _energy_after(problem, holders, load_RM, energy, move, new_load_RM)
        new_norm = max(new_energy, 1e-300) ** (1.0 / NORM)
        accepted = new_norm - norm <= -heat * np.log(random_unit(random_1))
        if accepted:
            move_holders(holders, move)
            if problem.min_replicas > 1 and not keeps_spread(holders, move, problem.nodes, problem.min_replicas):
                accepted = False
                restore_holders(holders, move)
        if not accepted:
            if move.other_rank >= 0:
                for r in (move.rank, move.other_rank):
                    new_load_RM[r] = load_RM[r]
            else:
                new_load_RM[:] = load_RM
            continue
        load_RM[:] = new_load_RM
        energy, norm = new_energy, new_norm
        filled += move_slots(experts_Rs, move)
        largest = _largest(load_RM, target_RM)
        if largest < best - 1e-12:
            best = largest
            best_experts_Rs[:] = experts_Rs
    experts_Rs[:] = best_experts_Rs
    return best


@compiled(forceinline=True)
def _energy_after(
    problem: BalanceProblem, holders: Holders, load_RM: np.ndarray, energy: float, move: Move, new_load_RM: np.ndarray
) -> float:
    """The energy after a move; `new_load_RM` is `load_RM` before and the loads after it afterwards."""
    load_EM, target_RM = problem.load_EM, problem.target_RM
    p, q = move.rank, move.other_rank
    if q >= 0:
        for m in range(load_RM.shape[1]):
            moved = 0.0
            if move.leaving >= 0:
                moved += load_EM[move.leaving, m] / holders.count_E[move.leaving]
            if move.coming >= 0:
                moved -= load_EM[move.coming, m] / holders.count_E[move.coming]
            energy -= _power(load_RM[p, m] / target_RM[p, m]) + _power(load_RM[q, m] / target_RM[q, m])
            new_load_RM[p, m] = load_RM[p, m] - moved
            new_load_RM[q, m] = load_RM[q, m] + moved
            energy += _power(new_load_RM[p, m] / target_RM[p, m]) + _power(new_load_RM[q, m] / target_RM[q, m])
        return energy
    for m in range(load_RM.shape[1]):
        if move.leaving >= 0:
            count = holders.count_E[move.leaving]
            before, after = load_EM[move.leaving, m] / count, load_EM[move.leaving, m] / (count - 1)
            for h in range(count):
                r = holders.rank_ER[move.leaving, h]
                if r == p:
                    new_load_RM[r, m] -= before
                else:
                    new_load_RM[r, m] += after - before
        if move.coming >= 0:
            count = holders.count_E[move.coming]
            before, after = load_EM[move.coming, m] / count, load_EM[move.coming, m] / (count + 1)
            for h in range(count):
                new_load_RM[holders.rank_ER[move.coming, h], m] += after - before
            new_load_RM[p, m] += after
    return _energy(new_load_RM, target_RM)
