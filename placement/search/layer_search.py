"""Search for the slots of one layer: which searches, one after the other, for which kind of problem.

T tokens, E experts, R ranks, s slots of a rank, N nodes. Without replicas the swap search decides alone. With replicas
it is run several times on replicas of the hottest experts, and the best is refined by the replica search, on the rule
that dispatch uses; with several nodes the replica search first decides which experts each node holds. Where tokens,
experts and ranks are too many for the time, a swap search on some of the tokens is all there is.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from placement.search.balance import greedy_balance
from placement.search.problem import LayerProblem, closed_slots
from placement.search.replicas.replica_search import anneal_replicas, tokens_by_expert
from placement.search.scoring import Scored, score_slots
from placement.search.search_clock import SearchClock
from placement.search.swaps.swap_stages import (
    PENALTY,
    SETTLE_ROUNDS,
    Stage,
    search_fixed_shares,
    search_swaps,
    settle_loads,
)
from placement.xorshift import random_state

COVER_SECONDS, COVER_SECONDS_NODES = 0.05e-6, 0.06e-6  # nominal cost of covering one token in the replica search
# A replica search with fewer proposals than this for each (slot, rank) does worse than swaps of fixed shares.
MIN_PROPOSALS = 6
SWAP_TOKENS = 4096  # what swaps look at in layers that are too large for more
SWAP_SEARCHES = 4
NODE_SEARCHES = 3
RANK_HEATS = ((1.0, 0.05), (0.2, 0.02))
PARTS = (6, 48)  # of a replica search, at least and at most: after each the rule proper is asked
SCORE_SECONDS = 3.0e-6  # nominal cost of scoring one token of a layer anew


def proposal_seconds(problem: LayerProblem) -> float:
    """Nominal time of one proposal of the replica search."""
    pairs = float((problem.ids >= 0).sum())
    return 2 * pairs / problem.num_experts * (COVER_SECONDS if problem.num_nodes == 1 else COVER_SECONDS_NODES)


def search_replicas(
    problem: LayerProblem,
    start: Scored,
    seconds: float,
    heat: tuple[float, float],
    seed: tuple[int, ...],
    clock: SearchClock,
) -> Scored:
    """The best slots that the replica search meets from a start, in about `seconds` of nominal time."""
    token_N, start_E = tokens_by_expert(problem.ids, problem.num_experts)
    current_Rs = start.slots.astype(np.int32).copy()
    chunk_Rs = current_Rs.copy()
    best = start
    home_T = problem.home_T if problem.prefer_local_replicas else np.empty(0, np.int32)
    state_1 = random_state(*seed)
    scale = 1 + problem.weight_of_node
    unit = problem.num_tokens / problem.num_experts * (1 + problem.weight_of_node / 2)

    def run(begin: float, end: float, count: int) -> None:
        # Inside a part ties are broken by loads as they stand, not in the order of tokens: each part's best is scored
        # by the rule proper before it counts.
        nonlocal best
        best_2 = np.array([np.inf, np.inf])
        anneal_replicas(
            problem.ids, token_N, start_E, problem.pair_weight, current_Rs, problem.node_of_rank, problem.num_nodes,
            problem.weight_of_node, home_T, problem.min_replicas, problem.max_filled, problem.allowed, PENALTY[0] *
            scale, PENALTY[1] * scale, heat[0] * unit, heat[1] * unit, begin, end, count, state_1, chunk_Rs, best_2,
        )  # fmt: skip
        for slots_Rs in (chunk_Rs, current_Rs):
            found = score_slots(problem, slots_Rs.copy())
            if found.score.key < best.score.key:
                best = found

    # Each part's end is scored twice: fewer parts where tokens are many for the time.
    parts = int(np.clip(seconds / (0.25 * SCORE_SECONDS * max(problem.num_tokens, 1)), *PARTS))
    clock.run_schedule(run, max(200, int(seconds / proposal_seconds(problem))), seconds, chunks=parts)
    return best


def node_problem(problem: LayerProblem) -> LayerProblem:
    """The same layer with nodes in the place of ranks."""
    nodes = problem.num_nodes
    target_N = problem.target.reshape(nodes, -1).sum(1)
    allowed_N = (problem.allowed.reshape(nodes, -1).sum(1) + target_N) / 2
    return LayerProblem(
        ids=problem.ids,
        load=problem.load,
        pair_weight=problem.pair_weight,
        open_slots=problem.open_slots.reshape(nodes, -1).sum(1),
        node_of_rank=np.arange(nodes, dtype=np.int32),
        num_nodes=1,
        node_weight=0.0,
        min_replicas=problem.min_replicas,
        max_filled=min(problem.max_filled, nodes * problem.num_experts),
        target=target_N,
        allowed=allowed_N,
        load_cap=problem.load_cap,
    )


def slots_from_nodes(problem: LayerProblem, experts_Ns: np.ndarray) -> np.ndarray:
    """Slots int32 [R, s] with the experts of each node dealt to its ranks, heaviest first to the lightest."""
    slots_Rs = closed_slots(problem.open_slots)
    per_node = problem.num_ranks // problem.num_nodes
    filled_R = np.zeros(problem.num_ranks, np.int64)
    load_R = np.zeros(problem.num_ranks)
    for node, experts in enumerate(experts_Ns):
        ranks = np.arange(node * per_node, (node + 1) * per_node)
        for expert in sorted(experts[experts >= 0].tolist(), key=lambda e: (-problem.load[e], e)):
            free = filled_R[ranks] < problem.open_slots[ranks]
            rank = ranks[int(np.argmin(np.where(free, load_R[ranks] / problem.target[ranks], np.inf)))]
            slots_Rs[rank, filled_R[rank]] = expert
            filled_R[rank] += 1
            load_R[rank] += problem.load[expert]
    return slots_Rs


def search_layer(
    problem: LayerProblem,
    starts: list[np.ndarray],
    balanced_Rs: np.ndarray,
    seconds: float,
    seed: int,
    clock: SearchClock,
) -> Scored:
    """The best slots found for a layer; `starts` (slots int32 [R, s]) are among the candidates.

    `balanced_Rs` is looked at only where all else is above the limit.
    """
    given = [score_slots(problem, slots_Rs) for slots_Rs in starts]
    # Above the cap, where that is out of reach, a plan may be no further than the best of the starts.
    limit = max(problem.load_cap, min(1 / entry.score.balancedness for entry in given))

    def plain(entry: Scored) -> tuple[float, float]:
        return entry.score.plain_key(limit)

    def guarded(entry: Scored) -> tuple[float, float]:
        return entry.score.guarded_key(limit, problem.num_tokens)

    found: list[Scored] = []
    if not problem.has_replicas:
        found.append(score_slots(problem, search_swaps(problem, given[0], seconds, (seed, 1), clock)))
    elif problem.prefer_local_replicas:
        # What few visits alone make of it comes close; from there the replica search sees what is near to whom.
        anywhere = replace(problem, prefer_local_replicas=False)
        base = search_layer(anywhere, starts, balanced_Rs, 0.5 * seconds, seed, clock)
        found.append(score_slots(problem, base.slots))
        found.append(search_replicas(problem, found[-1], 0.4 * seconds, (0.1, 0.01), (seed, 9), clock))
    elif seconds / proposal_seconds(problem) < MIN_PROPOSALS * starts[0].size * problem.num_ranks:
        found += search_fixed_shares(problem, given[0], seconds, (seed, 2), clock, SWAP_TOKENS)
    elif problem.num_nodes == 1:
        for turn in range(SWAP_SEARCHES):
            found += search_fixed_shares(problem, given[0], 0.6 / SWAP_SEARCHES * seconds, (seed, 3, turn), clock)
        best = min([*given, *found], key=guarded)
        found.append(search_replicas(problem, best, 0.35 * seconds, (0.05, 0.01), (seed, 4), clock))
    else:
        nodes = node_problem(problem)
        start_Ns = greedy_balance(
            nodes.load, nodes.open_slots, nodes.node_of_rank, nodes.num_nodes, nodes.target / nodes.target.max(),
            nodes.min_replicas, nodes.max_filled,
        )  # fmt: skip
        start = score_slots(nodes, start_Ns)
        by_node = [
            search_replicas(nodes, start, 0.3 / NODE_SEARCHES * seconds, (0.5, 0.05), (seed, 5, turn), clock)
            for turn in range(NODE_SEARCHES)
        ]
        best = min(by_node, key=lambda entry: entry.score.key)
        by_rank = score_slots(problem, slots_from_nodes(problem, best.slots))
        for turn, heat in enumerate(RANK_HEATS):  # the rule shares tokens anew in between
            stages: tuple[Stage, ...] = (("ranks", heat),)
            slots_Rs = search_swaps(problem, by_rank, 0.1 / len(RANK_HEATS) * seconds, (seed, 6, turn), clock, stages)
            by_rank = score_slots(problem, slots_Rs)
            found.append(by_rank)
        found.append(search_replicas(problem, by_rank, 0.55 * seconds, (0.1, 0.01), (seed, 7), clock))
        found += settle_loads(problem, found[-1], SETTLE_ROUNDS)[1:]
    best = min([*given, *found], key=guarded)
    # Whatever a guard is worth, none of the starts may be better on the tokens that were given.
    best = min([best, *given], key=plain)
    if plain(best)[0] > 0:
        best = min([best, score_slots(problem, balanced_Rs)], key=plain)
    return best
