"""Rows on the domains of OLMoE's trace: how even each is with one plan for all, and what a drained rank costs."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.placement.olmoe import TRACE
from benchmarks.placement.rows import Row, Timer, eplb_placement, eplb_policy
from placement.placement import Placement
from placement.rule.evaluate import balancedness_of, evaluate
from placement.search.few_copies.resize import copies_between
from placement.search.optimizer import optimize
from placement.search.problem import PlanRequest
from placement.traces.importers import load_trace
from placement.traces.trace import ActivationTrace

# By slots a rank: the least balancedness of a domain and of all, and the largest fan-out.
GOALS = {8: (0.81, 0.94, 4.75), 9: (0.85, 0.95, 4.15)}
LOAD_CAP = 1.05
DRAIN_SLOTS, DRAINED = 10, 7
MOST_COPIES, MOST_FAN_OUT = 30, 1.03  # goals of a drain: copies, and fan-out over that of a plan from scratch


def figures_of(placement: Placement, trace: ActivationTrace) -> dict[str, float]:
    """Means over layers; ranks without slots do not count as idle."""
    used_R = (placement.slots_LER >= 0).any((0, 1))

    def balance(part: ActivationTrace) -> float:
        return float(balancedness_of(evaluate(placement, part).load_LR[:, used_R]).mean())

    whole = evaluate(placement, trace)
    found = {
        "worst_domain": min(balance(trace.of_domain(name)) for name in trace.domains),
        "balancedness": balance(trace),
        "fan_out": float(whole.fan_out.mean()),
    }
    return found | {f"balance_{step.tokens}": float(step.balancedness.mean()) for step in whole.steps}


def domain_rows(quick: bool) -> Iterator[Row]:
    """Planned on half of the tokens of all domains, scored on the others: all of them, and the worst domain."""
    trace = load_trace(TRACE)
    for slots, (worst, balance, fan_out) in GOALS.items():
        for seed in range(1 if quick else 3):
            planning, unseen = trace.split(seed)
            request = PlanRequest(8, 1, slots, load_cap=LOAD_CAP, seed=seed, effort=0.1 if quick else 1.0)
            case = f"{8 * slots} slots, 8 ranks, cap {request.load_cap}"
            if slots * 8 == trace.num_experts:
                linear = Placement.linear(trace.num_layers, trace.num_experts, 8)
                yield Row(case, "linear", seed, figures_of(linear, unseen))
            if eplb_policy() is not None:
                eplb = eplb_placement(planning.load(), request, 1)
                yield Row(case, "vLLM EPLB", seed, figures_of(eplb, unseen))
            timer = Timer()
            placement = timer.run(lambda t=planning, r=request: optimize(t, r)).placement
            found = figures_of(placement, unseen)
            met = found["worst_domain"] >= worst and found["balancedness"] >= balance and found["fan_out"] <= fan_out
            goal = f"worst >= {worst}, balance >= {balance}, fan-out <= {fan_out}"
            yield Row(case, "optimized", seed, found, goal, met, **timer.times())


def drain_rows(quick: bool) -> Iterator[Row]:
    """One of eight ranks drained: planned from the placement in use, and anew; with domains' caps, and without."""
    trace = load_trace(TRACE)
    effort = 0.1 if quick else 1.0
    for seed in range(1 if quick else 2):
        planning, unseen = trace.split(seed)
        for named in (False,) if quick else (False, True):
            tokens = planning if named else ActivationTrace(planning.topk_ids, planning.num_experts)
            in_use = optimize(tokens, PlanRequest(8, 1, DRAIN_SLOTS, seed=seed, effort=effort)).placement
            slots = tuple(0 if rank == DRAINED else DRAIN_SLOTS for rank in range(8))
            request = PlanRequest(8, 1, slots, seed=seed, effort=effort)
            case = f"80 slots, 8 ranks, one drained, domains {'capped' if named else 'not named'}"
            timer = Timer()
            anew = timer.run(lambda t=tokens, r=request: optimize(t, r)).placement
            fresh = figures_of(anew, unseen) | {"copies": copies_between(in_use, anew)}
            yield Row(case, "anew", seed, fresh, **timer.times())
            near = timer.run(lambda t=tokens, r=request, p=in_use: optimize(t, r, p)).placement
            found = figures_of(near, unseen) | {"copies": copies_between(in_use, near)}
            met = found["copies"] <= MOST_COPIES and found["fan_out"] <= MOST_FAN_OUT * fresh["fan_out"]
            goal = f"copies <= {MOST_COPIES}, fan-out <= {MOST_FAN_OUT} x anew"
            yield Row(case, "from the one in use", seed, found, goal, met, **timer.times())
