"""What single steps make of a placement: each batch is dispatched as a router does it, after the batches before.

T tokens of a step, S steps, L layers, K experts of one token, E experts, R ranks.

Loads of a whole trace are more even than those of a step, and a step waits for its fullest rank. A decode step's tokens
come from many requests, so they are drawn from all of the trace; a prefill step's are neighbours in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from placement.placement import Placement, check_same_model
from placement.rule.local_replicas import keep_local
from placement.rule.recent_loads import choose_ranks
from placement.rule.replica_choice import check_top_k
from placement.traces.trace import ActivationTrace

STEP_TOKENS = (32, 256, 2048)
PREFILL_TOKENS = 1024  # steps of so many tokens and above are those of prompts
MAX_STEPS = 32
WARM_UP_STEPS = 1  # of a router's memory; they are not counted


@dataclass(frozen=True, eq=False)
class StepFigures:
    """Means over steps of `tokens` tokens; float64 [L].

    `balancedness`: by speed, of the pairs of single steps. `activated`: (expert, rank) pairs whose weights are read;
    `busiest_activated`: those of the rank that reads longest, as many as the fastest rank reads meanwhile.
    """

    tokens: int
    num_steps: int
    fan_out: np.ndarray
    balancedness: np.ndarray
    activated: np.ndarray
    busiest_activated: np.ndarray

    @property
    def phase(self) -> str:
        """Whose step it is."""
        return "prefill" if self.tokens >= PREFILL_TOKENS else "decode"


@dataclass(frozen=True, eq=False)
class StepCounts:
    """What each rank gets in each step of a layer: rows, pairs, and distinct experts, all int64 [S, R]."""

    rows_SR: np.ndarray
    pairs_SR: np.ndarray
    activated_SR: np.ndarray

    def balancedness_S(self, speed_R: np.ndarray) -> np.ndarray:
        """float64 [S]: time of the slowest rank if loads were in proportion to speeds, over its time as they are."""
        most_S = (self.pairs_SR / speed_R).max(1)
        ideal_S = self.pairs_SR.sum(1) / speed_R.sum()
        return np.divide(ideal_S, most_S, out=np.ones(len(most_S)), where=most_S > 0)


def draw_steps(num_tokens: int, tokens: int, max_steps: int = MAX_STEPS, seed: int = 0) -> np.ndarray:
    """int64 [S, T]: places in a trace of the tokens of each step; no step where the trace has fewer tokens than one."""
    count = min(max_steps, num_tokens // tokens)
    if tokens < PREFILL_TOKENS:
        return np.random.default_rng(seed).permutation(num_tokens)[: count * tokens].reshape(count, tokens)
    start_S = np.linspace(0, num_tokens - tokens, count).round().astype(np.int64)
    return start_S[:, None] + np.arange(tokens)


def count_steps(
    placement: Placement, layer: int, ids_STK: np.ndarray, prefer_local_replicas: bool = False
) -> StepCounts:
    """Dispatch the steps of a layer, int32 [S, T, K], one after the other.

    With `prefer_local_replicas` there is a router on every node, and tokens are shared evenly; ranks get what all send.
    """
    num_steps, num_ranks, num_experts = len(ids_STK), placement.num_ranks, placement.num_experts
    node_of_rank_R, work_R, slots_LER = placement.node_of_rank_R, placement.work_R, placement.slots_LER[layer][None]
    tables = [slots_LER[0]]
    if prefer_local_replicas:
        tables = [keep_local(slots_LER, node_of_rank_R == node)[0] for node in range(placement.num_nodes)]
    load_QR = np.zeros((len(tables), num_ranks), np.int64)
    rows_SR, pairs_SR, activated_SR = np.zeros((3, num_steps, num_ranks), np.int64)
    for step, ids_TK in enumerate(ids_STK):
        used_RE = np.zeros((num_ranks, num_experts), bool)
        for router, slots_ER in enumerate(tables):
            mine_TK = np.ascontiguousarray(ids_TK[router :: len(tables)])
            rank_TK = np.empty(mine_TK.shape, np.int32)
            load_R = load_QR[router]
            choose_ranks(mine_TK, slots_ER, node_of_rank_R, placement.num_nodes, work_R, load_R, rank_TK)
            visits_TR = np.zeros((len(mine_TK), num_ranks + 1), bool)
            np.put_along_axis(visits_TR, rank_TK.astype(np.int64), True, axis=1)  # -1 goes into the last column
            rows_SR[step] += visits_TR[:, :num_ranks].sum(0)
            served_TK = rank_TK >= 0
            pairs_SR[step] += np.bincount(rank_TK[served_TK], minlength=num_ranks)
            used_RE[rank_TK[served_TK], mine_TK[served_TK]] = True
        activated_SR[step] = used_RE.sum(1)
    return StepCounts(rows_SR, pairs_SR, activated_SR)


def evaluate_steps(
    placement: Placement,
    trace: ActivationTrace,
    step_tokens: Sequence[int] = STEP_TOKENS,
    prefer_local_replicas: bool = False,
    max_steps: int = MAX_STEPS,
    seed: int = 0,
) -> tuple[StepFigures, ...]:
    """The figures of steps of each size; sizes that the trace has too few tokens for are left out.

    Raises ValueError if the trace is of another model, or a size is below 1.
    """
    check_same_model("the placement", placement, "the trace", trace)
    check_top_k(trace.topk_ids.shape[2])
    if min(step_tokens, default=1) < 1 or max_steps < 1:
        raise ValueError(f"steps of {list(step_tokens)} tokens, at most {max_steps} of them: each must be at least 1")
    found = []
    for tokens in step_tokens:
        at_ST = draw_steps(trace.num_tokens if trace.has_sets else 0, tokens, max_steps, seed)
        warm_up = min(WARM_UP_STEPS, len(at_ST) - 1)
        if not len(at_ST):
            continue
        fan_out, balance, activated, busiest = np.zeros((4, placement.num_layers))
        for layer in range(placement.num_layers):
            counts = count_steps(placement, layer, trace.ids_of_layer(layer)[at_ST], prefer_local_replicas)
            fan_out[layer] = counts.rows_SR[warm_up:].sum(1).mean() / tokens
            balance[layer] = counts.balancedness_S(placement.speed_R)[warm_up:].mean()
            activated[layer] = counts.activated_SR[warm_up:].sum(1).mean()
            slowness_R = placement.speed_R.max() / placement.speed_R
            busiest[layer] = (counts.activated_SR[warm_up:] * slowness_R).max(1).mean()
        found.append(StepFigures(tokens, len(at_ST) - warm_up, fan_out, balance, activated, busiest))
    return tuple(found)
