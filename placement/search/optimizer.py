"""The planner: from a trace and a request to a placement.

T tokens, L layers, K experts of one token, E experts, R ranks, s slots of a rank.

Every layer is planned on its own. Its experts are relabelled in an order that follows from the data alone, so the plan
does not depend on how experts are numbered. Candidates are greedy balancing, the current placement and what the
searches find from them. The best by the rule that dispatch uses is returned, so the plan is never worse than what it
started from.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from placement.placement import EMPTY, Placement, check_same_model
from placement.rule.evaluate import evaluate
from placement.rule.replica_choice import check_top_k
from placement.search.balance import even_split_load
from placement.search.balance_search import best_balance
from placement.search.eplb import packed_slots
from placement.search.few_copies.in_use import current_slots, held_ER, is_legal, near_current
from placement.search.layer_search import search_layer
from placement.search.lean_replicas import TRIAL_SHARE, filled_that_pays, lean_replicas, narrowed
from placement.search.problem import (
    LayerProblem,
    PlanRequest,
    canonical_order,
    domain_loads,
    greedy_slots,
    load_guard,
    rank_targets,
)
from placement.search.replica_budget import spread_replicas
from placement.search.scoring import score_slots
from placement.search.search_clock import SearchClock
from placement.search.swaps.repair import bounded_moves
from placement.traces.trace import ActivationTrace

NOMINAL_SECONDS_A_LAYER = 3.0  # of search, at effort 1
START_SECONDS = 0.6  # reading, loading compiled code: not for the searches
TOKEN_SECONDS = 4.5e-6  # greedy starts and scoring, for each token of a layer: not for the searches either
BALANCE_ITERATIONS = 40_000


@dataclass(frozen=True)
class PlanResult:
    """A placement, and how good it is on the tokens it was planned on.

    `fan_out`, `node_fan_out`, `far_fan_out` (see `Evaluation`; NaN without `prefer_local_replicas`) and `balancedness`
    float64 [L]. Without sampled sets the first three are NaN and the last is that of an even split. `cut`: time ran out
    or the search was stopped, so the result depends on the machine's speed. `notes` are lines for a person.
    """

    placement: Placement
    fan_out: np.ndarray
    node_fan_out: np.ndarray
    far_fan_out: np.ndarray
    balancedness: np.ndarray
    seconds: float
    cut: bool
    notes: tuple[str, ...]


def build_problem(
    ids_TK: np.ndarray,
    load_E: np.ndarray,
    request: PlanRequest,
    max_filled: int,
    iterations: int,
    domain_T: np.ndarray | None = None,
) -> tuple[LayerProblem, np.ndarray, np.ndarray]:
    """The layer's problem and two balanced starts, slots int32 [R, s]; experts numbered as in the arguments.

    Where no placement can keep to the caps, because one expert alone is above it or the slots are too few, the limit is
    the least that the search for balance reaches. `domain_T` int [T], the domain of each token: each gets a cap.
    """
    order_T = np.random.default_rng(request.seed + 1).permutation(len(ids_TK))
    ids_TK = np.ascontiguousarray(ids_TK[order_T])
    sets_E = np.bincount(ids_TK[ids_TK >= 0], minlength=len(load_E)).astype(float)
    target_R = rank_targets(load_E, request)
    guard = 0.0
    has_replicas = max_filled > len(load_E)
    if len(ids_TK):
        guard = load_guard(request.load_cap, len(ids_TK), ids_TK.shape[1], request.num_ranks, has_replicas)
    problem = LayerProblem(
        ids=ids_TK,
        load=load_E,
        pair_weight=np.where(sets_E > 0, load_E / np.maximum(sets_E, 1), 1.0),
        open_slots=request.open_slots_R,
        node_of_rank=request.node_of_rank_R,
        num_nodes=request.num_nodes,
        # Wherever a single replica stands, it is remote for as many tokens: only visited ranks count.
        node_weight=0.0 if request.prefer_local_replicas and not has_replicas else request.node_weight,
        min_replicas=request.min_replicas,
        max_filled=max_filled,
        target=target_R,
        allowed=target_R * (request.load_cap - guard),
        load_cap=request.load_cap,
        arrival=np.argsort(order_T),
        prefer_local_replicas=request.prefer_local_replicas,
        speeds=request.speeds,
    )
    if domain_T is not None and len(ids_TK):
        problem = replace(problem, domains=domain_loads(problem, domain_T[order_T]))
    greedy_Rs = greedy_slots(load_E, request, max_filled)
    balanced_Rs, _ = best_balance(problem.balance, greedy_Rs, iterations, request.seed)
    least = float((even_split_load(balanced_Rs, load_E) / target_R).max())
    if least > request.load_cap - guard:
        # Replicas let the rule do a little better than an even split; single replicas do not.
        problem = replace(problem, allowed=target_R * least)
    if problem.domains is not None:
        balanced_Rs, reached = best_balance(problem.joint_balance, balanced_Rs, iterations, request.seed)
        domains = problem.domains
        least_RD = domains.target_RD * domains.cap_D * reached
        problem = replace(problem, domains=domains._replace(allowed_RD=np.maximum(domains.allowed_RD, least_RD)))
    return problem, greedy_Rs, balanced_Rs


def _relabel(slots_Rs: np.ndarray, new_of_old_E: np.ndarray) -> np.ndarray:
    held = slots_Rs >= 0
    return np.where(held, new_of_old_E[np.where(held, slots_Rs, 0)], slots_Rs).astype(np.int32)


def optimize(
    trace: ActivationTrace,
    request: PlanRequest,
    current: Placement | None = None,
    progress: Callable[[int, int], None] | None = None,
    stopped: Callable[[], bool] | None = None,
    start_s: float | None = None,
) -> PlanResult:
    """Plan a placement.

    Args:
        trace: sets to plan fan-out on. From counts alone only balance can be planned, and a note says so.
        current: the placement in use, maybe of other ranks or slots: what is near it is one of the candidates, every
            copy costs `copy_price`, and `max_moves` counts from it.
        progress: called with the layers done and their total.
        stopped: asked now and then; once true, the layers left get the best so far.
        start_s: `time.perf_counter()` at the start of the call, if earlier than now; `seconds` count from there.

    Raises ValueError if the request cannot be met, such as fewer slots than experts or a placement of another model.
    """
    start_s = time.perf_counter() if start_s is None else start_s
    request.check_experts(trace.num_experts)
    check_top_k(trace.topk_ids.shape[2])
    if current is not None:
        check_same_model("the current placement", current, "the trace", trace)
        if current.num_ranks != request.num_ranks and request.max_moves is not None:
            raise ValueError(f"the current placement has {current.num_ranks} ranks, {request.num_ranks} are asked for")
    if request.max_moves is not None and current is None:
        raise ValueError("max_moves needs the current placement")
    seconds = search_seconds(request, trace.num_layers, trace.num_tokens)
    deadline_s = None if request.seconds is None else start_s + request.seconds - max(0.3, 0.05 * request.seconds)
    clock = SearchClock(deadline_s, stopped, seconds * trace.num_layers, trace.num_layers)
    load_LE = trace.load(request.load_source)
    notes = []
    if not trace.has_sets:
        notes.append("the trace holds only counts: load was balanced, fan-out could not be optimized")
    elif trace.counts is not None and request.load_source == "auto" and not trace.frequency_true():
        notes.append("the trace's sets are not a uniform sample of what it counted: load was taken from the sets")
    max_filled_L = spread_replicas(trace, load_LE, request)
    near = None if current is None or request.max_moves is not None else near_current(current, request, load_LE)

    rows, figures, num_slots = [], [], int(request.open_slots_R.max())
    for layer in range(trace.num_layers):
        filled, of_layer, left_s = int(max_filled_L[layer]), request, seconds
        if request.worth is not None:

            def trial(filled: int, layer: int = layer) -> np.ndarray:
                asked, trial_s = narrowed(request, filled), TRIAL_SHARE * seconds
                return _plan_layer(trace, layer, load_LE[layer], asked, filled, None, None, trial_s, clock, [])[0]

            filled, trials = filled_that_pays(trial, trace, layer, request, request.worth, filled)
            of_layer, left_s = narrowed(request, filled), (1 - trials * TRIAL_SHARE) * seconds
        slots_Rs, figure = _plan_layer(
            trace, layer, load_LE[layer], of_layer, filled, current, near, left_s, clock, notes
        )
        slots_Rs = np.pad(slots_Rs, ((0, 0), (0, num_slots - slots_Rs.shape[1])), constant_values=EMPTY)
        clock.layer_done()
        rows.append(np.where(slots_Rs >= 0, slots_Rs, EMPTY).ravel())
        figures.append(figure)
        if progress is not None:
            progress(layer + 1, trace.num_layers)
    placement = Placement(
        request.num_ranks, request.num_nodes, trace.num_experts, np.stack(rows), speeds=request.speeds
    )
    if clock.cut:
        notes.append(
            "the search was cut short: another machine, or this one when busier, may find another placement; "
            "allow more seconds or less effort"
        )
    table_LF = np.array(figures)
    if request.worth is not None and trace.has_sets:
        placement = lean_replicas(placement, trace, request, request.worth, lambda: clock.left() <= 0)
        found = evaluate(placement, trace, request.prefer_local_replicas)
        table_LF[:] = np.stack([found.fan_out, found.node_fan_out, found.far_fan_out, found.balancedness], axis=1)
    seconds = time.perf_counter() - start_s
    return PlanResult(
        placement, table_LF[:, 0], table_LF[:, 1], table_LF[:, 2], table_LF[:, 3], seconds, clock.cut,
        tuple(dict.fromkeys(notes)),
    )  # fmt: skip


def search_seconds(request: PlanRequest, num_layers: int, num_tokens: int) -> float:
    """Size of the search in each layer, in nominal seconds."""
    if request.effort is not None or request.seconds is None:
        return NOMINAL_SECONDS_A_LAYER * (1.0 if request.effort is None else request.effort)
    return 0.7 * max(0.0, (request.seconds - START_SECONDS) / num_layers - TOKEN_SECONDS * num_tokens)


def _plan_layer(
    trace: ActivationTrace,
    layer: int,
    load_E: np.ndarray,
    request: PlanRequest,
    max_filled: int,
    current: Placement | None,
    near: Placement | None,
    seconds: float,
    clock: SearchClock,
    notes: list[str],
) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """Slots int32 [R, s] of one layer, and its fan-out, node fan-out, far fan-out and balancedness."""
    ids_TK = trace.ids_of_layer(layer)
    order_E = canonical_order(ids_TK, load_E, request.seed)
    new_of_old_E = np.argsort(order_E).astype(np.int32)
    canonical_ids = np.where(ids_TK >= 0, new_of_old_E[np.maximum(ids_TK, 0)], -1).astype(np.int32)
    iterations = BALANCE_ITERATIONS if request.objective == "balance" or not trace.has_sets else BALANCE_ITERATIONS // 4
    if trace.has_sets:
        iterations = min(iterations, max(500, int(seconds * 20_000)))
    problem, greedy_Rs, balanced_Rs = build_problem(
        np.sort(canonical_ids, axis=1)[:, ::-1], load_E[order_E], request, max_filled, iterations,
        trace.domain if len(trace.domains) > 1 and request.objective == "fan_out" else None,
    )  # fmt: skip
    starts = [greedy_Rs]
    given = None
    if current is not None:
        problem = replace(
            problem, home=held_ER(current, layer, request)[order_E], copy_cost=request.copy_price * problem.num_tokens
        )
        for candidate in (current, near):
            if candidate is None or candidate.num_ranks != request.num_ranks:
                continue
            given = _relabel(current_slots(candidate, layer, request), new_of_old_E)
            if is_legal(given, request, trace.num_experts, max_filled):
                starts.append(given)
                break
        else:
            given = None
            if request.max_moves is not None:
                raise ValueError(
                    f"layer {layer}: the current placement does not meet the request, "
                    "bounded moves cannot start from it"
                )
    bounded: list[np.ndarray] = []
    if request.max_moves is not None and given is not None:
        bounded = [given, bounded_moves(problem, given, request.max_moves)]
    if request.objective == "balance" or not trace.has_sets:
        if bounded:
            slots_Rs = min(bounded, key=lambda slots: _worst(problem, slots))
        else:
            slots_Rs = _balance_layer(problem, [greedy_Rs, balanced_Rs, *starts[1:]], request)
        unknown = float("nan")
        worst = _worst(problem, slots_Rs)
        figure = (unknown, unknown, unknown, 1 / worst if worst > 0 else 1.0)
        if trace.has_sets:
            found = score_slots(problem, slots_Rs).score
            figure = (found.fan_out, found.node_fan_out, found.far_fan_out, figure[3])
    else:
        if bounded:
            scored = [score_slots(problem, slots) for slots in bounded]
            limit = max(1.0, scored[0].score.above)
            best = min(scored, key=lambda one: one.score.plain_key(limit))
        else:
            best = search_layer(problem, starts, balanced_Rs, seconds, request.seed, clock)
        slots_Rs, found = best.slots, best.score
        figure = (found.fan_out, found.node_fan_out, found.far_fan_out, found.balancedness)
        if found.balancedness < 1 / request.load_cap - 0.002:
            notes.append(
                f"layer {trace.layers[layer]}: largest rank load over the mean is {1 / found.balancedness:.3f}; "
                f"no better than {float((problem.allowed / problem.target).max()):.3f} was found possible"
            )
    return _relabel(slots_Rs, order_E.astype(np.int32)), figure


def _worst(problem: LayerProblem, slots_Rs: np.ndarray) -> float:
    """The largest rank load over its target, under an even split."""
    return float((even_split_load(slots_Rs, problem.load) / problem.target).max())


def _balance_layer(problem: LayerProblem, starts: list[np.ndarray], request: PlanRequest) -> np.ndarray:
    found = [
        best_balance(problem.balance, start, BALANCE_ITERATIONS if n == 1 else 0, request.seed + n, restarts=1)[0]
        for n, start in enumerate(starts)
    ]
    slots_R = request.open_slots_R
    if request.min_replicas == 1 and (slots_R == slots_R[0]).all() and slots_R.sum() <= problem.max_filled:
        found.append(packed_slots(problem.load, problem.num_ranks, int(slots_R[0])))
    return min(found, key=lambda slots: _worst(problem, slots))


__all__ = ["NOMINAL_SECONDS_A_LAYER", "PlanResult", "build_problem", "is_legal", "optimize", "search_seconds"]
