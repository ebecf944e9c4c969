"""Whether one layer's slots beat another's, on tokens that no search has seen, and how sure that is.

T tokens, K experts of one, E experts, R ranks, s slots of a rank, B blocks of tokens, S steps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from placement.rule.recent_loads import choose_ranks
from placement.rule.steps import PREFILL_TOKENS, STEP_TOKENS, draw_steps
from placement.search.problem import LayerProblem
from placement.search.scoring import assign, slot_table

BLOCK_TOKENS = 32  # consecutive tokens, which may be of one text: blocks are independent, tokens are not
# Pairs of one step go together, so a rank's load varies more than that of a count of independent pairs.
LOAD_DISPERSION = 1.5


class Served(NamedTuple):
    """What the rule makes of slots on the judging tokens.

    `visits_B` float64, weighted visits of each block of tokens; `over`, how far the worst rank's load is above what is
    allowed, in even loads, or 0; `load_R` float64.
    """

    num_tokens: int
    visits_B: np.ndarray
    load_R: np.ndarray
    over: float
    fan_out: float
    node_fan_out: float
    balancedness: float


class Gain(NamedTuple):
    """Cost saved by fewer visits and by less load above the cap, in visits a token; one standard error of either.

    `excess`: what the load above the cap costs before, on all tokens that are known. `steps`: minus what single steps
    lose by being less even, or 0.
    """

    visits: float
    visits_error: float
    load: float
    load_error: float
    excess: float
    steps: float = 0.0

    @property
    def saved(self) -> float:
        return self.visits + self.load + self.steps

    @property
    def error(self) -> float:
        return math.hypot(self.visits_error, self.load_error)

    def least(self, visits_errors: float, load_errors: float) -> float:
        """What is saved for certain: so many standard errors below what was seen.

        Loads are far noisier than visits. So visits may stand alone, where loads seem no worse than they save; and load
        that is above the cap for certain may be repaired by a change that likely does.
        """
        of_visits = self.visits - visits_errors * self.visits_error
        of_load = min(self.excess - load_errors * self.load_error, self.load - self.load_error)
        return min(max(of_visits, of_load + min(self.visits, 0.0)) + self.steps, self.saved)


NO_GAIN = Gain(0.0, 0.0, 0.0, 0.0, 0.0)


def serve(problem: LayerProblem, slots_Rs: np.ndarray) -> Served:
    """Apply the rule to the problem's tokens in their order."""
    rank_TK = assign(problem, slots_Rs)
    used = rank_TK >= 0
    weight_TK = problem.pair_weight[np.where(used, problem.ids, 0)] * used
    load_R = np.bincount(np.where(used, rank_TK, 0).ravel(), weight_TK.ravel(), minlength=problem.num_ranks)
    visits_T = distinct(rank_TK)
    nodes_T = np.ones(len(rank_TK))
    if problem.num_nodes > 1:
        nodes_T = distinct(np.where(used, problem.node_of_rank[rank_TK], -1))
    cost_T = visits_T + problem.weight_of_node * nodes_T
    begin_B = np.arange(0, max(len(cost_T), 1), BLOCK_TOKENS)
    visits_B = np.add.reduceat(cost_T, begin_B) if len(cost_T) else np.zeros(1)
    worst = float((load_R / problem.target).max())
    mean = 1 / max(len(cost_T), 1)
    over = over_allowed(load_R, problem.target, problem.allowed)
    return Served(
        num_tokens=max(len(cost_T), 1),
        visits_B=visits_B,
        load_R=load_R,
        over=over,
        fan_out=float(visits_T.sum() * mean),
        node_fan_out=float(nodes_T.sum() * mean),
        balancedness=1 / max(worst, 1e-12),
    )


def worst_in_steps(problem: LayerProblem, slots_Rs: np.ndarray) -> float:
    """The worst rank's load in single decode steps, in even loads: the mean over steps, then over their sizes.

    A step waits for its fullest rank. Slots that gather a token's experts save visits and may still lose by that, which
    the load of all tokens together does not show. Steps are drawn and dispatched as `evaluate_steps` does it, the same
    for all slots of a problem. 0 where the problem has too few tokens for a step.
    """
    num_ranks = problem.num_ranks
    table_ER = slot_table(slots_Rs, problem.num_experts)
    share_R = problem.target / problem.target.sum()
    worst = []
    for tokens in (size for size in STEP_TOKENS if size < PREFILL_TOKENS):
        ids_STK = problem.ids[draw_steps(problem.num_tokens, tokens)]
        if not len(ids_STK):
            continue
        rank_STK = np.empty(ids_STK.shape, np.int32)
        memory_R = np.zeros(num_ranks, np.int64)
        for ids_TK, rank_TK in zip(ids_STK, rank_STK, strict=True):
            choose_ranks(ids_TK, table_ER, problem.node_of_rank, problem.num_nodes, problem.work, memory_R, rank_TK)
        step_STK = np.broadcast_to(np.arange(len(ids_STK))[:, None, None], rank_STK.shape)
        key_N = (step_STK * num_ranks + rank_STK)[rank_STK >= 0]
        load_SR = np.bincount(key_N, minlength=len(ids_STK) * num_ranks).reshape(-1, num_ranks)
        even_SR = np.maximum(load_SR.sum(1, keepdims=True), 1) * share_R
        worst.append(float((load_SR / even_SR).max(1).mean()))
    return sum(worst) / len(worst) if worst else 0.0


def over_allowed(load_R: np.ndarray, target_R: np.ndarray, allowed_R: np.ndarray) -> float:
    """How far the worst rank's load is above what is allowed, in even loads; 0 where none is."""
    return float(np.maximum((load_R - allowed_R) / target_R, 0).max())


def compare(before: Served, after: Served, excess: float, pairs_of_rank: float, load_worth: float) -> Gain:
    """What `after` saves over `before` on the same tokens.

    Visits are compared block by block, so what both pay alike cancels. `excess` is the load above the cap, in even
    loads, of about `pairs_of_rank` pairs of each rank: chance alone moves it by the square root of those.
    """
    difference_B = before.visits_B - after.visits_B
    blocks = len(difference_B)
    error = float(np.sqrt(blocks) * difference_B.std(ddof=1)) / before.num_tokens if blocks > 1 else float("inf")
    load_error = load_worth * math.sqrt(LOAD_DISPERSION / max(pairs_of_rank, 1.0))
    visits = float(difference_B.sum()) / before.num_tokens
    return Gain(visits, error, load_worth * (before.over - after.over), load_error, load_worth * excess)


def distinct(group_TK: np.ndarray) -> np.ndarray:
    """float64 [T]: the distinct groups of each row, -1 left out."""
    ordered = np.sort(group_TK, axis=1)
    new = np.ones(ordered.shape, bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return (new & (ordered >= 0)).sum(1).astype(float)
