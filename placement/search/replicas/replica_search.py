"""The search with replicas: a schedule of annealing in parts, each part's slots scored by the rule proper.

T tokens, E experts, R ranks, s slots of a rank.
"""

from __future__ import annotations

import numpy as np

from placement.search.annealing import PENALTY_FROM, PENALTY_TO, Best, Schedule
from placement.search.problem import LayerProblem
from placement.search.replicas.annealing import anneal_replicas
from placement.search.replicas.state import limits_of, state_of, tokens_of
from placement.search.scoring import Scored, score_slots
from placement.search.search_clock import SearchClock
from placement.xorshift import random_state

# Nominal seconds to cover one token in the search, on one node and on several.
COVER_SECONDS, COVER_SECONDS_NODES = 0.05e-6, 0.06e-6
SCORE_SECONDS = 3.0e-6  # nominal seconds to score one token of a layer by the rule
# A part lasts a quarter of the nominal time of one scoring, if that makes neither fewer nor more parts than these.
PART_OF_SCORING = 0.25
LEAST_PARTS, MOST_PARTS = 6, 48
LEAST_PROPOSALS = 200


def proposal_seconds(problem: LayerProblem) -> float:
    """Nominal time of one proposal: the tokens of two experts are covered anew."""
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
    """The best slots that the search meets from a start, in about `seconds` of nominal time.

    `heat`, from and to, is in the weighted visits of the tokens that want an average expert.
    """
    tokens, limits, state = tokens_of(problem), limits_of(problem), state_of(problem, start.slots)
    random_1 = random_state(*seed)
    found_Rs = state.experts_Rs.copy()
    best = start
    scale = 1 + problem.weight_of_node
    unit = problem.num_tokens / problem.num_experts * (1 + problem.weight_of_node / 2)

    def run(begin: float, end: float, count: int) -> None:
        # Inside a part the rule breaks ties by loads as they stand, not in the order of tokens. So the best slots of
        # each part are scored by the rule proper before they count.
        nonlocal best
        schedule = Schedule(heat[0] * unit, heat[1] * unit, PENALTY_FROM * scale, PENALTY_TO * scale, begin, end, count)
        best_of_part = Best(found_Rs, np.array([np.inf, np.inf]))
        anneal_replicas(tokens, limits, schedule, state, best_of_part, random_1)
        for slots_Rs in (found_Rs, state.experts_Rs):
            scored = score_slots(problem, slots_Rs.copy())
            if scored.score.key < best.score.key:
                best = scored

    # Each part's end is scored twice: fewer parts where there are many tokens for the time.
    parts = int(
        np.clip(seconds / (PART_OF_SCORING * SCORE_SECONDS * max(problem.num_tokens, 1)), LEAST_PARTS, MOST_PARTS)
    )
    count = max(LEAST_PROPOSALS, int(seconds / proposal_seconds(problem)))
    clock.run_schedule(run, count, seconds, chunks=parts)
    return best
