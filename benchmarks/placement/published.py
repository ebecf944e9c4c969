"""Published balancers next to ours on inputs that are public: `python -m benchmarks.placement.published [--quick]`.

S steps, T tokens of a step, K experts of a token, E experts, R ranks, P (expert, rank) pairs.

OLMoE's routing, planned on half of the tokens, scored on the others. What others do with a step is computed here from
their descriptions and not by their code: LPLB as the optimum of its linear program, METRO as the optimum that its
heuristic looks for. docs/published-tables.md has the figures, and what cannot be reproduced.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy.optimize import linprog

from benchmarks.common import print_table, save
from benchmarks.placement.exact import golden_rows
from benchmarks.placement.olmoe import TRACE
from benchmarks.placement.rows import eplb_placement, eplb_policy
from placement.placement import Placement
from placement.rule.evaluate import balancedness_of, even_split_loads
from placement.rule.steps import count_steps, draw_steps
from placement.search.optimizer import optimize
from placement.search.problem import PlanRequest
from placement.traces.importers import load_trace
from placement.traces.trace import ActivationTrace

RANKS, SEED = 8, 0


def least_largest(work_E: np.ndarray, holds_ER: np.ndarray) -> float:
    """The largest rank load, where work of experts may be split over the ranks that hold them in the best way.

    For work of one each that may not be split it is the next integer: a flow with whole capacities can be whole.
    """
    wanted = np.flatnonzero(work_E)
    expert_P, rank_P = np.nonzero(holds_ER[wanted])
    num_pairs, num_ranks = len(expert_P), holds_ER.shape[1]
    shares = np.zeros((len(wanted), num_pairs + 1))
    shares[expert_P, np.arange(num_pairs)] = 1
    loads = np.zeros((num_ranks, num_pairs + 1))
    loads[rank_P, np.arange(num_pairs)] = 1
    loads[:, -1] = -1  # load <= largest
    cost = np.zeros(num_pairs + 1)
    cost[-1] = 1
    found = linprog(cost, A_ub=loads, b_ub=np.zeros(num_ranks), A_eq=shares, b_eq=work_E[wanted], method="highs")
    return float(found.fun)


def step_figures(placement: Placement, trace: ActivationTrace, tokens: int, max_steps: int) -> dict[str, float]:
    """Means over layers and steps for three ways to choose replicas: at random, the best for a figure, and our rule."""
    at_ST = draw_steps(trace.num_tokens, tokens, max_steps, SEED)
    rng = np.random.default_rng(SEED)
    sums: dict[str, list[float]] = {}

    def add(**figures: float) -> None:
        for name, value in figures.items():
            sums.setdefault(name, []).append(value)

    for layer in range(placement.num_layers):
        ids_STK = trace.ids_of_layer(layer)[at_ST]
        holds_ER = placement.slots_LER[layer] >= 0
        counts = count_steps(placement, layer, ids_STK)
        balance_S, busiest_S = counts.balancedness_S(placement.speed_R), counts.activated_SR.max(1)
        for step, ids_TK in enumerate(ids_STK):
            if not step:
                continue  # our rule has no memory of loads yet
            work_E = np.bincount(ids_TK[ids_TK >= 0], minlength=placement.num_experts).astype(float)
            even = work_E.sum() / placement.num_ranks
            random_R, used = _at_random(ids_TK, holds_ER, rng)
            add(
                balance_random=even / random_R.max(),
                balance_lp=even / least_largest(work_E, holds_ER),
                balance_ours=float(balance_S[step]),
                busiest_random=float(used.sum(0).max()),
                busiest_least=float(np.ceil(least_largest((work_E > 0).astype(float), holds_ER) - 1e-6)),
                busiest_ours=float(busiest_S[step]),
                fan_out_ours=float(counts.rows_SR[step].sum() / tokens),
            )
    return {name: float(np.mean(values)) for name, values in sums.items()}


def _at_random(ids_TK: np.ndarray, holds_ER: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Loads [R] and experts used [E, R], bool, where every token takes any of an expert's replicas."""
    load_R, used_ER = np.zeros(holds_ER.shape[1]), np.zeros(holds_ER.shape, bool)
    for expert, wanted in enumerate(np.bincount(ids_TK[ids_TK >= 0], minlength=len(holds_ER)).tolist()):
        ranks = np.flatnonzero(holds_ER[expert])
        taken = rng.multinomial(wanted, np.full(len(ranks), 1 / len(ranks)))
        load_R[ranks] += taken
        used_ER[expert, ranks] = taken > 0
    return load_R, used_ER


def placements(trace: ActivationTrace, slots_per_rank: int, effort: float) -> Iterator[tuple[str, Placement]]:
    """vLLM's EPLB, and ours for fan-out under a load cap."""
    request = PlanRequest(RANKS, 1, slots_per_rank, load_cap=1.05, seed=SEED, effort=effort)
    if eplb_policy() is not None:
        yield "EPLB", eplb_placement(trace.load("sets"), request, 1)
    yield "ours", optimize(trace, request).placement


def step_rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Batches of four sizes on 64 experts with 8 and 32 replicas; 1,024 tokens are neighbours, as in prefill."""
    planning, unseen = load_trace(TRACE).split(SEED, 0.5)
    for slots_per_rank in (9,) if quick else (9, 12):
        for planner, placement in placements(planning, slots_per_rank, 0.3 if quick else 1.0):
            for tokens in (8, 32, 256, 1024):
                figures = step_figures(placement, unseen, tokens, 3 if quick else 9)
                yield {"slots": slots_per_rank * RANKS, "placement": planner, "tokens": tokens, **figures}


def replica_rows(quick: bool) -> Iterator[dict[str, Any]]:
    """More and more replicas: as many in every layer, as EPLB has it, and as many dealt to layers by their worth."""
    planning, unseen = load_trace(TRACE).split(SEED, 0.5)
    for a_layer in (0, 8, 16) if quick else (0, 8, 16, 24, 32):
        slots_per_rank = planning.num_experts // RANKS + a_layer // RANKS
        found: list[tuple[str, Placement]] = []
        if eplb_policy() is not None:
            request = PlanRequest(RANKS, 1, slots_per_rank, objective="balance")
            found.append(("EPLB, the same in every layer", eplb_placement(planning.load("sets"), request, 1)))
        for budget, name in ((None, "ours, the same in every layer"), (a_layer * planning.num_layers, "ours, dealt")):
            room = slots_per_rank + (2 if budget else 0)
            request = PlanRequest(
                RANKS, 1, room, objective="balance", seed=SEED, replica_budget=budget, effort=0.3 if quick else 1.0
            )
            found.append((name, optimize(planning, request).placement))
        for planner, placement in found:
            balance_L = balancedness_of(even_split_loads(placement, unseen.load("sets")))
            replicas_L = (placement.logical_replica_count - 1).sum(1)
            yield {
                "replicas": a_layer * planning.num_layers, "planner": planner,
                "by_layer": "/".join(map(str, replicas_L.tolist())),
                "balancedness": float(balance_L.mean()), "worst_layer": float(balance_L.min()),
            }  # fmt: skip


def main() -> None:
    """Print the tables and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps and shapes")
    args = parser.parse_args()
    tables = {
        "FlashLB": [{"planner": row.planner, **row.figures} for row in golden_rows() if row.case.startswith("FlashLB")],
        "LPLB and METRO": list(step_rows(args.quick)),
        "CRAFT": list(replica_rows(args.quick)),
    }
    for title, rows in tables.items():
        print_table(title, list(rows[0]), [list(row.values()) for row in rows])
    save("published-quick" if args.quick else "published", {"tables": tables})


if __name__ == "__main__":
    main()
