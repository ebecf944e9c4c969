"""`optimize` and `evaluate`: a plan from a trace, and how good plans are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from placement.capacity.replica_worth import Worth
from placement.command.ending import note, tell
from placement.placement import Placement
from placement.precompile import ensure_compiled
from placement.progress import ProgressBar
from placement.rule import evaluate as rule
from placement.search import optimizer
from placement.search.problem import PlanRequest
from placement.traces.importers import import_trace
from placement.traces.trace import ActivationTrace


def read_trace(path: Path, trace_format: str, num_experts: int | None, domain: str | None) -> ActivationTrace:
    """A trace, or the tokens of one of its domains. ValueError or OSError if it cannot be had."""
    trace = import_trace(path, trace_format, num_experts)
    return trace.of_domain(domain) if domain else trace


def request(*, step_tokens: tuple[int, ...] | None, **options: Any) -> dict[str, Any]:
    """Arguments of a PlanRequest."""
    return options | ({"worth": Worth(step_tokens=step_tokens)} if step_tokens else {})


def optimize(
    trace: ActivationTrace, options: dict[str, Any], current: Path | None, out: Path, start_s: float, as_json: bool
) -> None:
    """Plan, write JSON, print how good the plan is. `start_s` (perf_counter): when the bound on seconds began."""
    if options["slots_per_rank"] is None:
        # Ranks and replicas below 1 are for the request to refuse.
        needed = trace.num_experts * max(options["min_replicas"], 1)
        options["slots_per_rank"] = -(-needed // max(options["num_ranks"], 1))
    asked = PlanRequest(**options)
    now = Placement.load(current) if current else None
    start_s += ensure_compiled(note)
    with ProgressBar("layers planned") as bar:
        result = optimizer.optimize(trace, asked, now, progress=bar.update, start_s=start_s)
    planned = {
        "fan_out": _numbers(result.fan_out),
        "node_fan_out": _numbers(result.node_fan_out),
        "far_fan_out": _numbers(result.far_fan_out),
        "balancedness": _numbers(result.balancedness),
        "seconds": round(result.seconds, 3),
        "cut_short": result.cut,
        "seed": asked.seed,
        "load_cap": asked.load_cap,
        "prefer_local_replicas": asked.prefer_local_replicas,
        "layers": list(trace.layers),
    }
    out.write_text(json.dumps(result.placement.to_json() | {"planned": planned}) + "\n")
    for line in result.notes:
        note(f"note: {line}")
    figures = f"balancedness {result.balancedness.mean():.4f}"
    if asked.prefer_local_replicas and trace.has_sets:
        figures = f"far fan-out {result.far_fan_out.mean():.4f}, {figures}"
    if trace.has_sets:
        figures = f"fan-out {result.fan_out.mean():.4f}, node fan-out {result.node_fan_out.mean():.4f}, {figures}"
    line = f"{out}: {figures} on the planning tokens, {result.seconds:.1f} s"
    tell(as_json, {"out": str(out), "planned": planned, "notes": list(result.notes)}, [line])


def evaluate(
    trace: ActivationTrace,
    paths: Sequence[Path],
    speeds: tuple[float, ...] | None,
    slots_per_rank: int | tuple[int, ...] | None,
    prefer_local_replicas: bool,
    as_json: bool,
) -> None:
    """Print one row for each placement. ValueError names the file whose placement does not fit."""
    rows = {}
    with ProgressBar("placements scored") as bar:
        for done, path in enumerate(paths, 1):
            try:
                placement = rule.on_machines(Placement.load(path), speeds, slots_per_rank)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            evaluation = rule.evaluate(placement, trace, prefer_local_replicas)
            rows[str(path)] = evaluation.summary() | {
                "layers": [
                    {"layer": layer, "fan_out": fan, "node_fan_out": node, "far_fan_out": far, "balancedness": even}
                    for layer, fan, node, far, even in zip(
                        trace.layers,
                        _numbers(evaluation.fan_out),
                        _numbers(evaluation.node_fan_out),
                        _numbers(evaluation.far_fan_out),
                        _numbers(evaluation.balancedness),
                        strict=True,
                    )
                ]
            }
            bar.update(done, len(paths))
    if not trace.has_sets and not as_json:
        note("note: the trace holds only counts: balancedness is that of an even split, fan-out is unknown")
    unknown_is_null = {
        path: {name: None if value != value else value for name, value in row.items()} for path, row in rows.items()
    }
    tell(as_json, unknown_is_null, _table(rows))


def _table(rows: dict[str, dict[str, Any]]) -> Iterable[str]:
    width = max(len("placement"), *(len(path) for path in rows))
    columns = [name for name in next(iter(rows.values())) if name not in ("layers", "tokens")]
    yield f"{'placement':{width}s}" + "".join(f"  {name}" for name in columns) + f"{'tokens':>10s}"
    for path, row in rows.items():
        cells = "".join(f"{row[name]:{len(name) + 2}.4f}" for name in columns)
        yield f"{path:{width}s}{cells}{row['tokens']:10d}"


def _numbers(values: Iterable[float]) -> list[float | None]:
    return [None if value != value else round(float(value), 6) for value in values]
