"""Whether a replica pays: what it saves in load and visits, against the weights that one more rank has to read.

T tokens of a step, S steps, L layers, R ranks, s slots of a rank, B sizes of steps.

In a small step a shard's time is that of reading its activated experts, and a replica makes two ranks read one expert.
In a large one it is that of computing pairs, which a replica spreads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from placement.capacity.hardware import H100, Constants, ModelShape, busy_seconds
from placement.placement import EMPTY, Placement, check_same_model
from placement.rule.replica_choice import check_top_k
from placement.rule.steps import count_steps, draw_steps
from placement.topology import Links
from placement.traces.trace import ActivationTrace, TraceError

STEPS = 12  # of each size, at most; loads of more steps say little more
ALL_TOKENS = 6000  # of the steps of one size, about: what a trial may take


@dataclass(frozen=True)
class Worth:
    """What a layer is judged by: the model, the machines, and how many tokens steps have, each size as important."""

    model: ModelShape = field(default_factory=ModelShape)
    constants: Constants = H100
    links: Links = field(default_factory=Links)
    step_tokens: tuple[int, ...] = (64, 256)
    prefer_local_replicas: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.step_tokens or min(self.step_tokens) < 1:
            raise ValueError(f"step_tokens are {self.step_tokens}, expected at least one size of 1 token or more")


def layer_seconds(placement: Placement, trace: ActivationTrace, layer: int, worth: Worth) -> np.ndarray:
    """float64 [B]: mean time of the layer's slowest shard and of the router's rows, both ways, for each size of steps.

    Steps are dispatched by the rule, as routers do. Raises ValueError if the trace is of another model, TraceError if
    it has only counts or fewer tokens than a step.
    """
    check_same_model("the placement", placement, "the trace", trace)
    check_top_k(trace.topk_ids.shape[2])
    if not trace.has_sets or trace.num_tokens < max(worth.step_tokens):
        raise TraceError(
            f"steps of {max(worth.step_tokens)} tokens need sets of as many, the trace has "
            f"{trace.num_tokens if trace.has_sets else 'only counts'}"
        )
    return _seconds(placement, layer, _steps(trace, layer, worth), worth)


def replica_gains(
    placement: Placement,
    trace: ActivationTrace,
    layer: int,
    worth: Worth,
    stopped: Callable[[], bool] | None = None,
) -> dict[int, float]:
    """Seconds that a step saves, summed over sizes, by each slot of a layer that holds one of several replicas.

    Negative: the layer is faster without it. Arguments and errors as for `layer_seconds`; once `stopped`, the slots
    left are not among the answers.
    """
    layer_seconds(placement, trace, layer, worth)  # checks
    steps = _steps(trace, layer, worth)
    present_s = _seconds(placement, layer, steps, worth).sum()
    spare = np.flatnonzero(_replicas_of_slots(placement, layer) > 1)
    return {
        int(slot): float(_seconds(_emptied(placement, layer, int(slot)), layer, steps, worth).sum() - present_s)
        for slot in spare
        if stopped is None or not stopped()
    }


def without_idle_replicas(
    placement: Placement,
    trace: ActivationTrace,
    worth: Worth,
    min_replicas: int = 1,
    tolerance: float = 0.0,
    allowed: Callable[[Placement, int], bool] | None = None,
    stopped: Callable[[], bool] | None = None,
) -> Placement:
    """The placement without replicas that do not pay; their slots are empty.

    Replicas are looked at from the one that gains least, each against what is left. It stays if steps, each size's time
    over that with all replicas and then averaged, would be slower without it by more than `tolerance`. No expert gets
    fewer than `min_replicas`, and no layer gets what `allowed` (placement, layer) refuses. Once `stopped`, what is left
    stays. Errors as for `layer_seconds`.
    """
    if min_replicas < 1 or tolerance < 0:
        raise ValueError(f"min_replicas is {min_replicas}, tolerance {tolerance}, expected at least 1 and at least 0")
    for layer in range(placement.num_layers):
        whole_B = layer_seconds(placement, trace, layer, worth)
        steps = _steps(trace, layer, worth)
        gains = replica_gains(placement, trace, layer, worth, stopped)
        present = 1.0
        for slot in sorted(gains, key=lambda slot: (gains[slot], slot)):
            if stopped is not None and stopped():
                return placement
            if _replicas_of_slots(placement, layer)[slot] <= min_replicas:
                continue
            tried = _emptied(placement, layer, slot)
            relative = float((_seconds(tried, layer, steps, worth) / whole_B).mean())
            if relative <= present + tolerance and (allowed is None or allowed(tried, layer)):
                placement, present = tried, relative
    return placement


def _steps(trace: ActivationTrace, layer: int, worth: Worth) -> list[np.ndarray]:
    ids_TK = trace.ids_of_layer(layer)
    sizes = [(tokens, int(np.clip(ALL_TOKENS // tokens, 1, STEPS))) for tokens in worth.step_tokens]
    return [ids_TK[draw_steps(trace.num_tokens, tokens, steps, worth.seed)] for tokens, steps in sizes]


def _seconds(placement: Placement, layer: int, steps: Sequence[np.ndarray], worth: Worth) -> np.ndarray:
    # One layer on its own: tables of the others would be made anew for each trial.
    only = replace(placement, physical_to_logical_map=placement.physical_to_logical_map[layer : layer + 1])
    seconds = []
    for ids_STK in steps:
        counts = count_steps(only, 0, ids_STK, worth.prefer_local_replicas)
        busy_SR = busy_seconds(counts.activated_SR, counts.pairs_SR, worth.model, worth.constants, placement.speed_R)
        wire_S = 2 * counts.rows_SR.sum(1) * worth.model.row_bytes / worth.links.node.bandwidth_bytes_per_s
        seconds.append(float((busy_SR.max(1) + wire_S).mean()))
    return np.array(seconds)


def _replicas_of_slots(placement: Placement, layer: int) -> np.ndarray:
    """int [S]: how many replicas the expert in each slot has; 0 for an empty slot."""
    map_S = placement.physical_to_logical_map[layer]
    return np.where(map_S >= 0, placement.logical_replica_count[layer][np.maximum(map_S, 0)], 0)


def _emptied(placement: Placement, layer: int, slot: int) -> Placement:
    map_LS = placement.physical_to_logical_map.copy()
    map_LS[layer, slot] = EMPTY
    return replace(placement, physical_to_logical_map=map_LS)
