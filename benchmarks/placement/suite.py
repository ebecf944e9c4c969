"""The placement planner against published balancers, exact optima and its goals: `python -m benchmarks.placement`.

Every row shows its seed and time. Plans are scored on tokens they were not made from. The default takes about six
minutes of one core, `--quick` one. A missed goal is printed as MISSED and is no failure.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator

from benchmarks.common import print_table, save
from benchmarks.placement.domains import domain_rows, drain_rows
from benchmarks.placement.exact import exact_rows, golden_rows
from benchmarks.placement.large import balance_rows, scaling_rows, time_rows
from benchmarks.placement.olmoe import drift_rows, olmoe_rows
from benchmarks.placement.rows import Row, eplb_policy

SECTIONS: dict[str, tuple[str, Callable[[bool], Iterator[Row]]]] = {
    "golden": ("Published examples", lambda quick: golden_rows()),
    "exact": ("Exact optimum", exact_rows),
    "olmoe": ("OLMoE-1B-7B, planned on half of the tokens, scored on the others", olmoe_rows),
    "drift": ("Drift between domains of OLMoE, one plan per window of 2,000 tokens", drift_rows),
    "domains": ("Domains of OLMoE, one plan for all, scored on unseen tokens", domain_rows),
    "drain": ("A rank of OLMoE's drained", drain_rows),
    "balance": ("Balance alone, lognormal loads, replicas share evenly", balance_rows),
    "time": ("Time on one core", time_rows),
    "scaling": ("Growth of cost", scaling_rows),
}
VERDICT = {None: "", True: "met", False: "MISSED"}


def print_rows(title: str, rows: list[Row]) -> None:
    """Print one table, with a column for each figure that any row has."""
    names = list(dict.fromkeys(name for row in rows for name in row.figures))

    def cell(value: float | None) -> str:
        if value is None or math.isnan(value):
            return ""
        return str(value) if isinstance(value, int) else f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"

    print_table(
        title,
        ["case", "planner", "seed", *(name.replace("_", " ") for name in names), "cpu s", "goal", ""],
        [
            [
                row.case, row.planner, row.seed, *(cell(row.figures.get(name)) for name in names), cell(row.cpu_s),
                row.goal, VERDICT[row.met],
            ]
            for row in rows
        ],
    )  # fmt: skip


def main() -> None:
    """Run the chosen sections; print tables and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer splits, layers and cases")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="only this section; may be repeated")
    args = parser.parse_args()
    if eplb_policy() is None:
        print("vllm is not installed: the rows of its EPLB are left out")
    sections = {}
    for name in args.only or SECTIONS:
        title, make = SECTIONS[name]
        rows = list(make(args.quick))
        print_rows(title, rows)
        sections[name] = [row.json() for row in rows]
    judged = [row for rows in sections.values() for row in rows if row["met"] is not None]
    missed = [row for row in judged if not row["met"]]
    print(f"\n{len(judged) - len(missed)} of {len(judged)} goals met")
    name = "-".join(["placement", *(["quick"] if args.quick else []), *(args.only or [])])
    save(name, {"quick": args.quick, "sections": sections})
