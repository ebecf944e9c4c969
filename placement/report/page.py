"""A report on a placement for people: a self-contained HTML page, and its pictures as PNGs.

L layers, E experts, R ranks, T tokens.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from placement.placement import Placement
from placement.report.plots import check_matplotlib, draw_coactivation, draw_fan_out, draw_load, draw_moves
from placement.rule.evaluate import Evaluation, evaluate
from placement.rule.steps import StepFigures
from placement.traces.trace import ActivationTrace

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem } img { max-width: 100% }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #d5d9de }
th { border-bottom: 2px solid #1b1f24 } td:first-child, th:first-child { text-align: left }
.better { color: #116329 } .worse { color: #a40e26 }
"""


def moved_experts(before: Placement, after: Placement) -> np.ndarray:
    """int64 [L, R]: experts that each rank did not hold before, which a migration has to copy."""
    lacked_LER = (before.slots_LER < 0) & (after.slots_LER >= 0)
    return lacked_LER.sum(1)


def write_report(
    trace: ActivationTrace,
    placement: Placement,
    before: Placement | None,
    folder: str | Path,
    progress: Callable[[int, int], None] | None = None,
    max_layers: int = 8,
) -> list[Path]:
    """Write `report.html` and the PNGs into a folder, creating it; returns the paths.

    `before` None compares with the linear placement. Pictures show up to `max_layers` layers, evenly spaced; the table
    shows all. Raises ValueError if trace and placements differ in model or ranks, or matplotlib is not installed.
    """
    check_matplotlib()
    if before is None:
        before = Placement.linear(placement.num_layers, placement.num_experts, placement.num_ranks, placement.num_nodes)
        name = "linear"
    else:
        name = "before"
    if before.num_ranks != placement.num_ranks:
        raise ValueError(f"the placements have {before.num_ranks} and {placement.num_ranks} ranks")
    old, new = evaluate(before, trace), evaluate(placement, trace)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shown = np.unique(np.linspace(0, trace.num_layers - 1, min(max_layers, trace.num_layers)).round().astype(int))
    pictures: list[tuple[str, str, Path]] = []
    if trace.has_sets:
        path = folder / "fan_out.png"
        draw_fan_out(old, new, name, path)
        pictures.append(
            ("Ranks that a token visits", "Fewer means less traffic: a token's row is sent once to each.", path)
        )
    path = folder / "load.png"
    draw_load(trace, old, new, name, shown.tolist(), path)
    pictures.append(
        ("Load of each rank", "Divided by the layer's mean; the largest decides how long a step takes.", path)
    )
    moved_LR = moved_experts(before, placement)
    path = folder / "moves.png"
    draw_moves(trace, moved_LR, path)
    pictures.append(("What moved", "Number of experts a rank did not hold before, by layer and rank.", path))
    for done, layer in enumerate(shown.tolist(), 1):
        if trace.has_sets:
            path = folder / f"coactivation_layer_{trace.layers[layer]}.png"
            draw_coactivation(trace, layer, before, placement, name, path)
            note = "Experts that tokens pick together, sorted by rank: dark inside the squares is good."
            pictures.append((f"Co-activation, layer {trace.layers[layer]}", note, path))
        if progress is not None:
            progress(done, len(shown))
    page = folder / "report.html"
    page.write_text(_page(trace, placement, old, new, name, int(moved_LR.sum()), pictures))
    return [page, *(path for _, _, path in pictures)]


def _page(
    trace: ActivationTrace,
    placement: Placement,
    old: Evaluation,
    new: Evaluation,
    name: str,
    moved: int,
    pictures: list[tuple[str, str, Path]],
) -> str:
    filled = int((placement.physical_to_logical_map >= 0).sum())
    facts = (
        f"{placement.num_layers} layers of {placement.num_experts} experts on {placement.num_ranks} ranks, "
        f"{placement.num_nodes} node{'s' if placement.num_nodes > 1 else ''}; {filled} slots hold an expert, "
        f"{moved} of them one that is new on its rank. "
        + (
            f"Scored on {trace.num_tokens} tokens by the rule that dispatch uses."
            if trace.has_sets
            else "The trace holds only counts: balancedness is that of an even split, fan-out is unknown."
        )
    )
    rows = [_row("mean", [_pair(old, new, key, slice(None)) for key in ("fan_out", "node_fan_out", "balancedness")])]
    for layer in range(trace.num_layers):
        cells = [_pair(old, new, key, layer) for key in ("fan_out", "node_fan_out", "balancedness")]
        rows.append(_row(f"layer {trace.layers[layer]}", cells))
    for was, now in zip(old.steps, new.steps, strict=True):
        cells = [
            _pair(was, now, "fan_out", slice(None)), (math.nan, math.nan, False),
            _pair(was, now, "balancedness", slice(None)),
        ]  # fmt: skip
        rows.append(_row(f"steps of {now.tokens} tokens ({now.phase})", cells))
    head = "".join(f"<th>{title}</th>" for title in ("", f"fan-out, {name}", "now", f"node fan-out, {name}", "now",
                                                      f"balancedness, {name}", "now"))  # fmt: skip
    figures = "".join(
        f"<h2>{html.escape(title)}</h2><p>{html.escape(note)}</p>"
        f'<img alt="{html.escape(title)}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for title, note, path in pictures
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Expert placement</title><style>{STYLE}</style>'
        f"<h1>Expert placement</h1><p>{html.escape(facts)}</p>"
        f"<table><tr>{head}</tr>{''.join(rows)}</table>{figures}</html>\n"
    )


def _pair(
    old: Evaluation | StepFigures, new: Evaluation | StepFigures, key: str, layer: int | slice
) -> tuple[float, float, bool]:
    was, now = (float(np.mean(getattr(evaluation, key)[layer])) for evaluation in (old, new))
    return was, now, (now > was) == (key == "balancedness")


def _row(title: str, cells: list[tuple[float, float, bool]]) -> str:
    def cell(was: float, now: float, better: bool) -> str:
        if was != was or now != now:
            return "<td>unknown</td><td>unknown</td>"
        mark = "" if abs(now - was) < 5e-4 else f' class="{"better" if better else "worse"}"'
        return f"<td>{was:.3f}</td><td{mark}>{now:.3f}</td>"

    return f"<tr><td>{html.escape(title)}</td>{''.join(cell(*entry) for entry in cells)}</tr>"
