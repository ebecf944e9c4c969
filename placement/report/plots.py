"""The pictures of a report; each function writes one PNG. Only this part of the planner needs matplotlib.

L layers, E experts, R ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from placement.placement import Placement
from placement.rule.evaluate import Evaluation
from placement.traces.trace import ActivationTrace

BEFORE, AFTER, LINE = "#9aa4af", "#1f6feb", "#c9372c"


def check_matplotlib() -> None:
    """Raise ValueError, in one line, if matplotlib is not installed; otherwise choose its backend without a display."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("reports need matplotlib: pip install 'expertmesh[report]' or matplotlib") from None
    matplotlib.use("Agg")


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")
    for axis in axes.ravel():
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def order_by_rank(placement: Placement, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Experts int64 [E] sorted by the first rank that holds them, and the end of each rank's block: int64 [R]."""
    first_rank_E = np.argmax(placement.slots_LER[layer] >= 0, axis=1)
    order_E = np.argsort(first_rank_E, kind="stable")
    return order_E, np.cumsum(np.bincount(first_rank_E, minlength=placement.num_ranks))


def draw_coactivation(
    trace: ActivationTrace, layer: int, before: Placement, after: Placement, name: str, path: Path
) -> None:
    """Co-activation matrix of a layer, with experts sorted by rank, before and after."""
    together_EE = trace.coactivation(layer) / max(trace.num_tokens, 1)
    np.fill_diagonal(together_EE, np.nan)
    top = float(np.nanquantile(together_EE, 0.99)) or None
    figure, axes = _figure(1, 2, 11, 5.2)
    for axis, placement, title in ((axes[0, 0], before, name), (axes[0, 1], after, "now")):
        order_E, ends_R = order_by_rank(placement, layer)
        image = axis.imshow(together_EE[np.ix_(order_E, order_E)], cmap="Blues", vmin=0, vmax=top)
        starts_R = np.concatenate([[0], ends_R[:-1]])
        for begin, end in zip(starts_R, ends_R, strict=True):
            axis.plot(
                np.array([begin, end, end, begin, begin]) - 0.5, np.array([begin, begin, end, end, begin]) - 0.5,
                color=LINE, linewidth=1,
            )  # fmt: skip
        block_E = np.repeat(np.arange(len(ends_R)), ends_R - starts_R)
        ordered_EE = np.nan_to_num(together_EE[np.ix_(order_E, order_E)])
        inside = ordered_EE[block_E[:, None] == block_E[None, :]].sum() / max(ordered_EE.sum(), 1e-12)
        axis.set_title(f"{title}: {inside:.0%} of pairs on one rank")
        axis.set_xlabel("expert, by rank")
        axis.set_ylabel("expert, by rank")
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(image, ax=axes.ravel().tolist(), label="share of tokens that pick both", shrink=0.85)
    _save(figure, path)


def draw_fan_out(old: Evaluation, new: Evaluation, name: str, path: Path) -> None:
    """Histogram of how many ranks a token visits, over all layers."""
    figure, axes = _figure(1, 1, 8, 3.6)
    axis = axes[0, 0]
    for evaluation, color, title, shift in ((old, BEFORE, name, -0.2), (new, AFTER, "now", 0.2)):
        count = evaluation.fan_out_histogram.sum(0)
        axis.bar(np.arange(len(count)) + shift, count / max(count.sum(), 1), 0.4, color=color,
                 label=f"{title}: mean {evaluation.fan_out.mean():.2f}")  # fmt: skip
    axis.set_xlabel("ranks that a token visits in a layer")
    axis.set_ylabel("share of tokens")
    axis.set_xticks(range(1, old.fan_out_histogram.shape[1]))
    axis.set_xlim(0.4, old.fan_out_histogram.shape[1] - 0.4)
    axis.legend(frameon=False)
    _save(figure, path)


def draw_load(
    trace: ActivationTrace, old: Evaluation, new: Evaluation, name: str, layers: list[int], path: Path
) -> None:
    """Load of each rank over the mean, one row of bars for each layer."""
    columns = 2 if len(layers) > 1 else 1
    rows = -(-len(layers) // columns)
    figure, axes = _figure(rows, columns, 11 if columns == 2 else 8, 2.4 * rows + 0.6)
    for axis in axes.ravel()[len(layers) :]:
        axis.set_visible(False)
    for axis, layer in zip(axes.ravel(), layers, strict=False):
        ranks = np.arange(old.load_LR.shape[1])
        for evaluation, color, title, shift in ((old, BEFORE, name, -0.2), (new, AFTER, "now", 0.2)):
            load_R = evaluation.load_LR[layer]
            axis.bar(ranks + shift, load_R / max(load_R.mean(), 1e-12), 0.4, color=color,
                     label=f"{title}: balancedness {evaluation.balancedness[layer]:.2f}")  # fmt: skip
        axis.axhline(1.0, color=LINE, linewidth=1)
        axis.set_title(f"layer {trace.layers[layer]}", fontsize=10, loc="left")
        axis.set_ylabel("load / mean")
        axis.set_ylim(0, axis.get_ylim()[1] * 1.28)
        axis.set_xlabel("rank")
        axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")
        axis.xaxis.get_major_locator().set_params(integer=True)
    _save(figure, path)


def draw_moves(trace: ActivationTrace, moved_LR: np.ndarray, path: Path) -> None:
    """Number of experts new on each rank, by layer."""
    figure, axes = _figure(1, 1, 8, min(1.2 + 0.35 * len(moved_LR), 12))
    axis = axes[0, 0]
    image = axis.imshow(moved_LR, cmap="Blues", aspect="auto", vmin=0)
    axis.set_xlabel("rank")
    axis.set_ylabel("layer")
    step = max(1, len(moved_LR) // 24)
    axis.set_yticks(range(0, len(moved_LR), step), [str(trace.layers[i]) for i in range(0, len(moved_LR), step)])
    axis.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axis, label="new experts")
    _save(figure, path)
