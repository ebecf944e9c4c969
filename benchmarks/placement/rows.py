"""Rows of the placement benchmark, and the balancers the planner is compared with.

L layers, E experts, S slots.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from placement.placement import Placement
from placement.rule.evaluate import evaluate
from placement.search.problem import PlanRequest
from placement.traces.trace import ActivationTrace


@dataclass
class Row:
    """One row of the table: what was planned, by which planner, its figures, and its goal if there is one.

    `met` is None without a goal. `cpu_s` is the processor time of the planning call alone, which means the same on a
    busy machine; `wall_s` is its wall-clock time.
    """

    case: str
    planner: str
    seed: int
    figures: dict[str, float]
    goal: str = ""
    met: bool | None = None
    cpu_s: float = float("nan")
    wall_s: float = float("nan")
    layers: list[dict[str, float]] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        """Plain values, NaN as None."""
        return {key: _plain(value) for key, value in asdict(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if isinstance(value, (np.floating, float)):
        return None if value != value else round(float(value), 5)
    return bool(value) if isinstance(value, np.bool_) else value


class Timer:
    """Processor and wall time of one call."""

    def __init__(self) -> None:
        self.cpu_s = self.wall_s = float("nan")

    def run(self, call: Callable[[], Any]) -> Any:
        """Time the call and return its result."""
        cpu, wall = time.process_time(), time.perf_counter()
        result = call()
        self.cpu_s, self.wall_s = time.process_time() - cpu, time.perf_counter() - wall
        return result

    def times(self) -> dict[str, float]:
        """Keyword arguments of a Row."""
        return {"cpu_s": self.cpu_s, "wall_s": self.wall_s}


@functools.cache
def eplb_policy() -> Any:
    """vLLM's EPLB policy; None if vllm is not installed."""
    try:
        from vllm.distributed.eplb.policy.default import DefaultEplbPolicy
    except ImportError:
        return None
    return DefaultEplbPolicy


def eplb_placement(
    load_LE: np.ndarray, request: PlanRequest, num_groups: int, current: Placement | None = None
) -> Placement:
    """The placement vLLM's EPLB makes for the loads. With `current`, it keeps slots where it can."""
    import torch

    old = None if current is None else torch.from_numpy(current.physical_to_logical_map.astype(np.int64))
    map_LS = eplb_policy().rebalance_experts(
        torch.from_numpy(np.ascontiguousarray(load_LE)),
        int(request.open_slots_R.sum()),
        num_groups,
        request.num_nodes,
        request.num_ranks,
        old,
    )
    return Placement(
        request.num_ranks, request.num_nodes, load_LE.shape[1], map_LS.numpy().astype(np.int32), speeds=request.speeds
    )


def scored(placement: Placement, trace: ActivationTrace) -> dict[str, float]:
    """Figures of a placement on a trace, by the rule dispatch uses."""
    figures = evaluate(placement, trace).summary()
    return {key: value for key, value in figures.items() if key != "tokens"}


def moved_experts(old: Placement, new: Placement) -> int:
    """Replicas that ranks must fetch, over all layers: those a rank holds in `new` but not in `old`."""
    moved = 0
    for layer in range(old.num_layers):
        for rank in range(old.num_ranks):
            before = set(old.experts_of_rank(rank)[layer].tolist())
            moved += len(set(new.experts_of_rank(rank)[layer].tolist()) - before - {-1})
    return moved
