"""Search by swaps for the slots of one layer: how runs of the compiled search are put together.

T tokens, R ranks, s slots of a rank, I items, G groups, N nodes. Without replicas that decides alone: nodes first, then
ranks inside each node, then both. With replicas each keeps the tokens that the rule gives it for the length of a run;
then the rule shares them anew, and single swaps settle what that leaves above the allowed load.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from placement.search.problem import EXCESS_WEIGHT, LayerProblem, first_tokens
from placement.search.replicas.holders import CLOSED
from placement.search.replicas.replica_search import EXCESS_TOLERANCE
from placement.search.scoring import Scored, score_slots
from placement.search.search_clock import SearchClock
from placement.search.swaps.bitsets import assigned_token_bits
from placement.search.swaps.descent import descend_swaps
from placement.search.swaps.swap_search import anneal_swaps
from placement.xorshift import random_state

# Nominal cost of a proposal, in seconds: what a search is sized by (a fraction of the speed of a 2023 server core).
SWAP_SECONDS, SWAP_SECONDS_A_WORD = 0.4e-6, 2.0e-9
PENALTY = (0.5, 20.0)
# A stage of the search: between nodes, between ranks of one node, or between any ranks; and its heat, from and to.
Stage = tuple[Literal["nodes", "ranks", "both"], tuple[float, float]]
FROM_SCRATCH: tuple[Stage, ...] = (("both", (1.0, 0.05)),)
FROM_SCRATCH_ON_NODES: tuple[Stage, ...] = (("nodes", (2.0, 0.05)), ("ranks", (1.0, 0.05)), ("both", (0.2, 0.02)))
# Runs between which the rule shares the tokens of replicas anew: their share of the time, and their stages.
TURNS: tuple[tuple[float, tuple[Stage, ...]], ...] = ((0.6, ()), (0.4, (("both", (0.03, 0.01)),)))
SETTLE_ROUNDS = 4


class _Items:
    """Slots as items of the swap search: experts or replicas with fixed tokens, empty slots, closed slots."""

    def __init__(self, problem: LayerProblem, start: Scored) -> None:
        experts_Rs, rank_TK = start.slots, start.rank_TK
        self.shape = experts_Rs.shape
        self.expert_I = experts_Rs.ravel().astype(np.int32)
        self.items_Rs = np.arange(experts_Rs.size, dtype=np.int32).reshape(experts_Rs.shape)
        item_ER = np.full((problem.num_experts, len(experts_Rs)), -1, np.int32)
        rank_N, slot_N = np.nonzero(experts_Rs >= 0)
        item_ER[experts_Rs[rank_N, slot_N], rank_N] = self.items_Rs[rank_N, slot_N]
        used = rank_TK >= 0
        item_N = item_ER[problem.ids[used], rank_TK[used]]
        self.load_I = np.bincount(item_N, problem.pair_weight[problem.ids[used]], minlength=experts_Rs.size)
        self.bits_IW = assigned_token_bits(problem.ids, rank_TK, item_ER, experts_Rs.size)

    def experts(self, items_Rs: np.ndarray) -> np.ndarray:
        """Slots int32 [R, s] of where the items stand."""
        return self.expert_I[items_Rs]


def _run_swaps(
    problem: LayerProblem,
    items: _Items,
    items_Gs: np.ndarray,
    parent_G: np.ndarray,
    allowed_G: np.ndarray,
    weights: tuple[float, float],
    within_parents: bool,
    heat: tuple[float, float],
    iterations: int,
    seed: tuple[int, ...],
    seconds: float,
    clock: SearchClock,
) -> tuple[np.ndarray, tuple[float, float]]:
    """One schedule of the swap search, of nominal `seconds`; the best items int32 [G, s] and their (excess, visits)."""
    state_1 = random_state(*seed)
    current_Gs = items_Gs.astype(np.int32).copy()
    group_I = np.empty(len(items.expert_I), np.int32)
    group_I[current_Gs.ravel()] = np.repeat(np.arange(len(current_Gs)), current_Gs.shape[1])
    best_Gs, best_2 = current_Gs.copy(), np.array([np.inf, np.inf])
    unit = problem.num_tokens / problem.num_experts * sum(weights)
    scale = sum(weights)

    def run(begin: float, end: float, count: int) -> None:
        anneal_swaps(
            items.bits_IW, items.load_I, items.expert_I, current_Gs, group_I, parent_G, allowed_G, weights[0],
            weights[1], within_parents, problem.min_replicas > 1, problem.num_tokens, PENALTY[0] * scale,
            PENALTY[1] * scale, heat[0] * unit, heat[1] * unit, begin, end, count, state_1, best_Gs, best_2,
        )  # fmt: skip

    clock.run_schedule(run, iterations, seconds)
    return best_Gs, (float(best_2[0]), float(best_2[1]))


def search_swaps(
    problem: LayerProblem,
    start: Scored,
    seconds: float,
    seed: tuple[int, ...],
    clock: SearchClock,
    stages: tuple[Stage, ...] = (),
) -> np.ndarray:
    """The best placement that swaps reach from a start, in about `seconds` of nominal time; slots int32 [R, s].

    Without `stages` the search is from scratch, level by level, with restarts; otherwise these are run, once.
    """
    items = _Items(problem, start)
    cost = SWAP_SECONDS + SWAP_SECONDS_A_WORD * items.bits_IW.shape[1]
    total = max(2000, int(seconds / cost))
    restarts = 1
    if not stages:
        stages = FROM_SCRATCH if problem.num_nodes == 1 else FROM_SCRATCH_ON_NODES
        # A restart is worth more than a longer run once a run is some hundred proposals for each pair of slots.
        restarts = int(np.clip(total / len(stages) // max(400 * start.slots.size * 8, 1), 1, 12))
    per_run = total // (restarts * len(stages))
    best_Rs: np.ndarray | None = None
    best_key = (np.inf, np.inf)
    for restart in range(restarts):
        items_Rs = items.items_Rs
        for stage, heat in stages:
            run = (heat, per_run, (*seed, restart, ("nodes", "ranks", "both").index(stage) + 1), per_run * cost, clock)
            if stage == "nodes":
                # Ranks inside a node cannot be filled to the brim as well: half of what the cap leaves is theirs.
                allowed_N = problem.allowed.reshape(problem.num_nodes, -1).sum(1)
                target_N = problem.target.reshape(problem.num_nodes, -1).sum(1)
                node_N = np.arange(problem.num_nodes, dtype=np.int32)
                items_Ns, key = _run_swaps(
                    problem, items, items_Rs.reshape(problem.num_nodes, -1), node_N, (allowed_N + target_N) / 2,
                    (1.0, 0.0), False, *run,
                )  # fmt: skip
                items_Rs = _spread_closed(items, items_Ns.reshape(items.shape), start.slots)
            else:
                weights = (1.0, 0.0 if stage == "ranks" else problem.weight_of_node)
                items_Rs, key = _run_swaps(
                    problem, items, items_Rs, problem.node_of_rank, problem.allowed, weights, stage == "ranks", *run
                )
        if best_Rs is None or key < best_key:
            best_Rs, best_key = items_Rs, key
        if clock.left() <= 0:
            break
    assert best_Rs is not None
    return items.experts(best_Rs)


def _spread_closed(items: _Items, items_Rs: np.ndarray, start_Rs: np.ndarray) -> np.ndarray:
    """Items of each node back on ranks such that closed slots stand where they were."""
    if not (start_Rs == CLOSED).any():
        return items_Rs
    per_node = start_Rs.shape[0] * start_Rs.shape[1]
    result = items.items_Rs.copy()
    nodes = items_Rs.size // per_node if per_node else 1
    for node in range(nodes):
        rows = slice(node * start_Rs.shape[0] // nodes, (node + 1) * start_Rs.shape[0] // nodes)
        closed = start_Rs[rows] == CLOSED
        node_items = items_Rs[rows].ravel()
        result[rows][~closed] = node_items[items.expert_I[node_items] != CLOSED]
    return result


def search_fixed_shares(
    problem: LayerProblem,
    start: Scored,
    seconds: float,
    seed: tuple[int, ...],
    clock: SearchClock,
    num_tokens: int | None = None,
) -> list[Scored]:
    """Swaps of replicas that keep their tokens for a while; `num_tokens` of them are looked at, None: all."""
    some = problem if num_tokens is None else first_tokens(problem, num_tokens)
    best = start if some is problem else score_slots(some, start.slots)
    for turn, (share, stages) in enumerate(TURNS):  # the rule shares tokens anew in between
        best = score_slots(some, search_swaps(some, best, share * seconds, (*seed, turn), clock, stages))
    settled = settle_loads(some, best, SETTLE_ROUNDS)
    best = min(settled, key=lambda entry: entry.score.guarded_key(some.load_cap, some.num_tokens))
    return [best] if some is problem else settle_loads(problem, score_slots(problem, best.slots), 1)


def settle_loads(problem: LayerProblem, start: Scored, rounds: int) -> list[Scored]:
    """The start, and what is left of it after rounds of the best swaps off ranks above what is allowed.

    Moves are few, so that the rule shares tokens nearly as before; each round starts from how it does.
    """
    found = [start]
    for _ in range(rounds):
        if found[-1].score.over <= EXCESS_TOLERANCE:
            break
        items = _Items(problem, found[-1])
        items_Rs = items.items_Rs.copy()
        descend_swaps(
            items.bits_IW, items.load_I, items.expert_I, items_Rs, problem.node_of_rank, problem.allowed,
            problem.weight_of_node, EXCESS_WEIGHT * problem.num_tokens, problem.min_replicas > 1, items_Rs.size, 0, 0.0,
            random_state(0),
        )  # fmt: skip
        found.append(score_slots(problem, items.experts(items_Rs)))
    return found
