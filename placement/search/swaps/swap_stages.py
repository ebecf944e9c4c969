"""Search by swaps for the slots of one layer: how runs of the compiled search are put together.

T tokens, R ranks, s slots of a rank, I items, G groups, N nodes, P (token, expert) pairs. Without replicas, swaps
decide alone: between nodes first, then between the ranks of each node, then between any ranks. With replicas, each
keeps the tokens the rule gave it during a run; then the rule shares tokens out again, and single swaps settle what that
leaves above the allowed load.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from placement.search.annealing import EXCESS_TOLERANCE, PENALTY_FROM, PENALTY_TO, Best, Schedule
from placement.search.problem import EXCESS_WEIGHT, LayerProblem, first_tokens
from placement.search.scoring import Scored, score_slots
from placement.search.search_clock import SearchClock
from placement.search.swaps.bitsets import assigned_token_bits
from placement.search.swaps.descent import descend_swaps
from placement.search.swaps.state import Groups, Items
from placement.search.swaps.swap_search import anneal_swaps
from placement.xorshift import random_state

# Nominal cost of a proposal, in seconds: what a search is sized by (a fraction of the speed of a 2023 server core).
SWAP_SECONDS, SWAP_SECONDS_A_WORD = 0.4e-6, 2.0e-9
LEAST_PROPOSALS = 2000
# Another restart is worth more than a longer run once a run has so many proposals for each slot.
RESTART_PROPOSALS = 3200
MOST_RESTARTS = 12
LEVELS = ("nodes", "ranks", "both")  # between nodes, between ranks of one node, between any ranks


class Stage(NamedTuple):
    """One run of a search: what it swaps between, and its heat, from and to, in visits of an expert's tokens."""

    between: Literal["nodes", "ranks", "both"]
    heat: tuple[float, float]


# Hot stages lose what they start from and find a new order; cool ones improve what they are given.
FROM_SCRATCH = (Stage("both", (1.0, 0.05)),)
FROM_SCRATCH_ON_NODES = (Stage("nodes", (2.0, 0.05)), Stage("ranks", (1.0, 0.05)), Stage("both", (0.2, 0.02)))
# Runs, between which the rule shares the tokens of replicas out again: their share of the time, and their stages. The
# first is from scratch; the second is cool, so as to keep most of what the first found.
TURNS: tuple[tuple[float, tuple[Stage, ...]], ...] = ((0.6, ()), (0.4, (Stage("both", (0.03, 0.01)),)))
SETTLE_ROUNDS = 4  # of single swaps at the end, at most: fewer if no rank is above its limit


def as_items(problem: LayerProblem, slots: Scored) -> Items:
    """Slots as items, numbered in the order of slots: experts or replicas with the tokens that the rule gives them."""
    experts_Rs, rank_TK = slots.slots, slots.rank_TK
    item_ER = np.full((problem.num_experts, len(experts_Rs)), -1, np.int32)
    rank_N, slot_N = np.nonzero(experts_Rs >= 0)
    item_ER[experts_Rs[rank_N, slot_N], rank_N] = rank_N * experts_Rs.shape[1] + slot_N
    used = rank_TK >= 0
    item_P = item_ER[problem.ids[used], rank_TK[used]]
    weight_P = problem.pair_weight[problem.ids[used]]
    load_IM = np.empty((experts_Rs.size, problem.num_mixes))
    load_IM[:, 0] = np.bincount(item_P, weight_P, minlength=experts_Rs.size)
    if problem.domains is not None:
        key_P = item_P * problem.num_mixes + np.broadcast_to(problem.mix_T[:, None], used.shape)[used]
        of_domain_IM = np.bincount(key_P, weight_P, minlength=load_IM.size).reshape(load_IM.shape)
        load_IM[:, 1:] = of_domain_IM[:, 1:]
    bits_IW = assigned_token_bits(problem.ids, rank_TK, item_ER, experts_Rs.size)
    return Items(bits_IW, load_IM, experts_Rs.ravel().astype(np.int32))


def rank_groups(problem: LayerProblem, parent_weight: float | None = None) -> Groups:
    """Ranks as groups and nodes as their parents; `parent_weight` None: what the problem says of nodes."""
    weight = problem.weight_of_node if parent_weight is None else parent_weight
    return Groups(problem.node_of_rank, problem.allowed_RM, weight, problem.min_replicas > 1)


def _run_stage(
    problem: LayerProblem,
    items: Items,
    item_Rs: np.ndarray,
    stage: Stage,
    iterations: int,
    seconds: float,
    seed: tuple[int, ...],
    clock: SearchClock,
) -> tuple[np.ndarray, tuple[float, float]]:
    """One stage, of nominal `seconds`; the best items int32 [R, s] and their (excess, visits)."""
    if stage.between == "nodes":
        # Ranks inside a node cannot be filled to the brim as well: half of what the cap leaves is theirs.
        allowed_NM = problem.allowed_RM.reshape(problem.num_nodes, -1, problem.num_mixes).sum(1)
        target_NM = problem.target_RM.reshape(problem.num_nodes, -1, problem.num_mixes).sum(1)
        node_N = np.arange(problem.num_nodes, dtype=np.int32)
        groups = Groups(node_N, (allowed_NM + target_NM) / 2, 0.0, problem.min_replicas > 1)
        current_Gs = item_Rs.reshape(problem.num_nodes, -1)
    else:
        groups = rank_groups(problem, 0.0 if stage.between == "ranks" else None)
        current_Gs = item_Rs
    current_Gs = current_Gs.astype(np.int32)
    best = Best(current_Gs.copy(), np.array([np.inf, np.inf]))
    scale = 1.0 + groups.parent_weight
    unit = problem.num_tokens / problem.num_experts * scale
    heat_from, heat_to = stage.heat[0] * unit, stage.heat[1] * unit
    within_parents = stage.between == "ranks"
    random_1 = random_state(*seed)

    def run(begin: float, end: float, count: int) -> None:
        schedule = Schedule(heat_from, heat_to, PENALTY_FROM * scale, PENALTY_TO * scale, begin, end, count)
        anneal_swaps(items, groups, within_parents, schedule, problem.num_tokens, current_Gs, best, random_1)

    clock.run_schedule(run, iterations, seconds)
    return best.slots_Rs, (float(best.rating_2[0]), float(best.rating_2[1]))


def search_swaps(
    problem: LayerProblem,
    start: Scored,
    seconds: float,
    seed: tuple[int, ...],
    clock: SearchClock,
    stages: tuple[Stage, ...] = (),
) -> np.ndarray:
    """The best slots that swaps reach from a start, int32 [R, s], in about `seconds` of nominal time.

    Without `stages` the search is from scratch, level by level, with restarts; otherwise it runs these stages once.
    """
    items = as_items(problem, start)
    cost = SWAP_SECONDS + SWAP_SECONDS_A_WORD * items.bits_IW.shape[1]
    total = max(LEAST_PROPOSALS, int(seconds / cost))
    restarts = 1
    if not stages:
        stages = FROM_SCRATCH if problem.num_nodes == 1 else FROM_SCRATCH_ON_NODES
        restarts = int(np.clip(total / len(stages) // (RESTART_PROPOSALS * start.slots.size), 1, MOST_RESTARTS))
    per_run = total // (restarts * len(stages))
    best_Rs: np.ndarray | None = None
    best_key = (np.inf, np.inf)
    for restart in range(restarts):
        item_Rs = np.arange(start.slots.size, dtype=np.int32).reshape(start.slots.shape)
        for stage in stages:
            stream = (*seed, restart, LEVELS.index(stage.between) + 1)
            found_Gs, key = _run_stage(problem, items, item_Rs, stage, per_run, per_run * cost, stream, clock)
            item_Rs = found_Gs.reshape(start.slots.shape)
        if best_Rs is None or key < best_key:
            best_Rs, best_key = item_Rs, key
        if clock.left() <= 0:
            break
    assert best_Rs is not None
    return items.expert_I[best_Rs]


def search_fixed_shares(
    problem: LayerProblem,
    start: Scored,
    seconds: float,
    seed: tuple[int, ...],
    clock: SearchClock,
    num_tokens: int | None = None,
) -> list[Scored]:
    """Swaps of replicas that keep their tokens for a run; looks at the first `num_tokens` tokens, None: all."""
    some = problem if num_tokens is None else first_tokens(problem, num_tokens)
    best = start if some is problem else score_slots(some, start.slots)
    for turn, (share, stages) in enumerate(TURNS):
        best = score_slots(some, search_swaps(some, best, share * seconds, (*seed, turn), clock, stages))
    settled = settle_loads(some, best, SETTLE_ROUNDS)
    best = min(settled, key=lambda entry: entry.score.guarded_key(1.0, some.num_tokens))
    return [best] if some is problem else settle_loads(problem, score_slots(problem, best.slots), 1)


def settle_loads(problem: LayerProblem, start: Scored, rounds: int) -> list[Scored]:
    """The start, and what rounds of the best swaps off ranks above their limits make of it, one after the other.

    Swaps are few, so the rule shares tokens nearly as before; each round starts from how it does.
    """
    found = [start]
    for _ in range(rounds):
        if found[-1].score.over <= EXCESS_TOLERANCE:
            break
        items = as_items(problem, found[-1])
        item_Rs = np.arange(start.slots.size, dtype=np.int32).reshape(start.slots.shape)
        weight = EXCESS_WEIGHT * problem.num_tokens
        descend_swaps(items, rank_groups(problem), weight, 0.0, item_Rs, item_Rs.size, 0, random_state(0))
        found.append(score_slots(problem, items.expert_I[item_Rs]))
    return found
