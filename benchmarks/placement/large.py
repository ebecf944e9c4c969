"""Rows on synthetic models of DeepSeek's size: balance alone, time to plan and to refresh, and how cost grows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.placement.rows import Row, Timer, eplb_placement, eplb_policy, scored
from benchmarks.placement.synthetic import synthetic_trace
from placement.placement import Placement
from placement.policy import greedy_placement
from placement.rule.evaluate import evaluate, even_split_loads
from placement.search.optimizer import optimize
from placement.search.problem import PlanRequest
from placement.search.refresh import refresh
from placement.traces.trace import ActivationTrace

GROUPS = 8


def counts_trace(load_LE: np.ndarray, top_k: int = 8) -> ActivationTrace:
    """A trace with loads only, no tokens."""
    counts = np.rint(load_LE).astype(np.int64)
    return ActivationTrace(np.zeros((0, len(load_LE), top_k), np.int16), load_LE.shape[1], counts=counts)


def lognormal_loads(layers: int, experts: int, sigma: float, seed: int) -> np.ndarray:
    """float64 [L, E], about 10^4 per expert."""
    return np.random.default_rng(seed).lognormal(0, sigma, (layers, experts)) * 1e4


def tokens_of_loads(load_LE: np.ndarray, tokens: int, top_k: int, seed: int) -> ActivationTrace:
    """Tokens that pick experts independently, in proportion to load: for the node fan-out."""
    rng = np.random.default_rng(seed)
    ids = np.empty((tokens, len(load_LE), top_k), np.int16)
    for layer, load_E in enumerate(load_LE):
        score_TE = np.log(load_E) + rng.gumbel(size=(tokens, len(load_E)))
        ids[:, layer] = np.argpartition(-score_TE, top_k, axis=1)[:, :top_k]
    return ActivationTrace(ids, load_LE.shape[1])


def even_balance(placement: Placement, load_LE: np.ndarray) -> np.ndarray:
    """float64 [L]: balancedness when replicas share load evenly."""
    load_LR = even_split_loads(placement, load_LE)
    return load_LR.mean(1) / load_LR.max(1)


def balance_rows(quick: bool) -> Iterator[Row]:
    """58 layers of 256 experts on 64 ranks, planned by load alone; then random shapes against EPLB."""
    layers = 8 if quick else 58
    for sigma in (0.5, 1.0):
        load_LE = lognormal_loads(layers, 256, sigma, 0)
        tokens = tokens_of_loads(load_LE, 500, 8, 1)
        request = PlanRequest(64, 8, 5, objective="balance", seed=0)
        case = f"{layers} x 256, 320 slots, 64 ranks on 8 nodes, sigma {sigma}"
        counts = counts_trace(load_LE)
        planners = {
            "greedy": lambda t=counts, r=request: greedy_placement(t, r),
            "balance": lambda t=counts, r=request: optimize(t, r).placement,
        }
        if eplb_policy() is not None:
            planners = {
                "vLLM EPLB, 8 groups": lambda w=load_LE, r=request: eplb_placement(w, r, GROUPS),
                "vLLM EPLB, no groups": lambda w=load_LE, r=request: eplb_placement(w, r, 1),
            } | planners
        for planner, plan in planners.items():
            timer = Timer()
            placement = timer.run(plan)
            balance_L = even_balance(placement, load_LE)
            figures = {
                "balancedness": float(balance_L.mean()),
                "worst_balancedness": float(balance_L.min()),
                "node_fan_out": scored(placement, tokens)["node_fan_out"],
            }
            goal, met = "", None
            if planner == "balance":
                goal = "balance >= 0.97, worst layer >= 0.93"
                met = figures["balancedness"] >= 0.97 and figures["worst_balancedness"] >= 0.93
            yield Row(case, planner, 0, figures, goal, met, **timer.times())
    if eplb_policy() is not None:
        yield _never_below_eplb(quick)


def _never_below_eplb(quick: bool) -> Row:
    """The smallest lead over EPLB in any layer, over random shapes and loads."""
    rng = np.random.default_rng(7)
    least, layers = np.inf, 0
    timer = Timer()
    cpu_s = 0.0
    for _ in range(8 if quick else 40):
        nodes = int(rng.choice([1, 2, 4]))
        ranks = nodes * int(rng.choice([2, 4, 8]))
        experts = ranks * int(rng.integers(1, 9))
        request = PlanRequest(ranks, nodes, experts // ranks + int(rng.integers(0, 3)), objective="balance")
        load_LE = np.rint(lognormal_loads(2, experts, float(rng.uniform(0.1, 1.5)), int(rng.integers(2**31)))) + 1
        groups = max(nodes, 1) if experts % nodes == 0 else 1
        theirs = max(
            (eplb_placement(load_LE, request, g) for g in {groups, 1}), key=lambda p: even_balance(p, load_LE).mean()
        )
        counts = counts_trace(load_LE)
        ours = timer.run(lambda t=counts, r=request: optimize(t, r).placement)
        cpu_s += timer.cpu_s
        least = min(least, float((even_balance(ours, load_LE) - even_balance(theirs, load_LE)).min()))
        layers += len(load_LE)
    figures = {"least_lead": least, "layers": layers}
    return Row("random shapes, smallest lead over EPLB", "balance", 7, figures, ">= 0", least >= -1e-9, cpu_s=cpu_s)


def time_rows(quick: bool) -> Iterator[Row]:
    """A cold plan of 58 x 256 from 20,000 tokens in 10 s, and its warm refresh."""
    layers, tokens = (8, 5000) if quick else (58, 20_000)
    whole = not quick
    trace = synthetic_trace(tokens, num_layers=layers)
    later = synthetic_trace(2000, num_layers=layers, token_seed=1)
    request = PlanRequest(64, 8, 5, load_cap=1.05, seconds=10.0 * layers / 58)
    case = f"{layers} x 256, {tokens} tokens, 320 slots, 64 ranks on 8 nodes"
    warm_up = synthetic_trace(200, num_layers=1)
    start = greedy_placement(warm_up, request)
    optimize(warm_up, PlanRequest(64, 8, 5, seconds=0.2))
    refresh(start, warm_up)
    timer = Timer()
    if eplb_policy() is not None:
        placement = timer.run(lambda: eplb_placement(trace.load(), request, GROUPS))
        yield Row(case, "vLLM EPLB, 8 groups", 0, scored(placement, later), **timer.times())
    placement = timer.run(lambda: optimize(trace, request)).placement
    # Goals in seconds are for the whole model. --quick runs a part of it, without a verdict.
    goal = "10 s" if whole else "10 s for 58 layers"
    met = timer.wall_s <= 10.0 if whole else None
    yield Row(case, "cold plan", 0, scored(placement, later), goal, met, **timer.times())
    runs = [Timer() for _ in range(5)]
    for timer in runs:
        refreshed = timer.run(lambda: refresh(placement, later)).placement
    middle = sorted(runs, key=lambda run: run.cpu_s)[2]
    unseen = synthetic_trace(2000, num_layers=layers, token_seed=2)
    goal = "0.1 s" if whole else "0.1 s for 58 layers"
    met = middle.cpu_s <= 0.1 if whole else None
    yield Row(
        case, "refresh, median of 5", 0, scored(refreshed, unseen), goal, met, cpu_s=middle.cpu_s, wall_s=middle.wall_s
    )


BASE = {"num_tokens": 2500, "num_layers": 2, "num_experts": 128}


def scaling_rows(quick: bool) -> Iterator[Row]:
    """Processor time of a plan, a refresh and an evaluation as tokens, layers and experts grow, with exponents.

    The plan's search runs at its smallest size, since by design it takes the time it is given. What remains is what
    grows: reading the trace, starts, scoring by the rule.
    """
    steps = (1, 4) if quick else (1, 2, 4, 8)
    _time_of(**BASE)
    for name in BASE:
        points = []
        for step in steps:
            shape = BASE | {name: BASE[name] * step}
            if shape["num_experts"] > 512:
                continue
            points.append((step, *_time_of(**shape)))
            case = f"{shape['num_tokens']} tokens, {shape['num_layers']} layers, {shape['num_experts']} experts"
            figures = {"plan_s": points[-1][1], "refresh_s": points[-1][2], "evaluate_s": points[-1][3]}
            yield Row(case, f"growth with {name.removeprefix('num_')}", 0, figures, cpu_s=sum(figures.values()))
        log_N4 = np.log(np.array(points))
        exponent_3 = [float(np.polyfit(log_N4[:, 0], log_N4[:, n], 1)[0]) for n in (1, 2, 3)]
        figures = {f"{what}_exponent": e for what, e in zip(("plan", "refresh", "evaluate"), exponent_3, strict=True)}
        yield Row(f"exponent with {name.removeprefix('num_')}", "fit", 0, figures, "about 1", max(exponent_3) <= 1.25)


def _time_of(num_tokens: int, num_layers: int, num_experts: int) -> tuple[float, float, float]:
    trace = synthetic_trace(num_tokens, num_layers=num_layers, num_experts=num_experts)
    ranks = num_experts // 4
    request = PlanRequest(ranks, ranks // 8, 5, effort=0.002)
    plan, again, value = Timer(), Timer(), Timer()
    placement = plan.run(lambda: optimize(trace, request)).placement
    again.run(lambda: refresh(placement, trace))
    value.run(lambda: evaluate(placement, trace))
    return plan.cpu_s, again.cpu_s, value.cpu_s
