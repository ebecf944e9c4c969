"""The placements that a server's config can ask for by name.

L layers, E experts, R ranks, s slots of a rank.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from placement.placement import EMPTY, ModelSize, Placement, check_same_model
from placement.search.optimizer import NOMINAL_SECONDS_A_LAYER, optimize, search_seconds
from placement.search.problem import PlanRequest, canonical_order, greedy_slots
from placement.search.replica_budget import spread_replicas
from placement.traces.trace import ActivationTrace

logger = logging.getLogger(__name__)

SIZED_FOR = 0.35  # of the request's seconds: the rest is for a machine that is busy, or slower than nominal
PolicyName = Literal["linear", "random", "greedy", "optimized"]


def fewest_slots(model: ModelSize, num_ranks: int, num_nodes: int = 1, min_replicas: int = 1) -> int:
    """Slots a rank that hold every expert `min_replicas` times in linear order."""
    linear = Placement.linear(model.num_layers, model.num_experts, num_ranks, num_nodes, min_replicas)
    return linear.slots_per_rank


def build_placement(
    policy: str, request: PlanRequest, model: ModelSize, trace: ActivationTrace | None = None
) -> Placement:
    """A placement by policy.

    `linear` and `random` need no trace and ignore loads; only `linear` leaves slots empty that experts do not need.
    `greedy` balances the trace's loads. `optimized` plans fan-out under the request's load cap, within its `seconds`,
    by a search sized for a part of that. So the same arguments give the same placement however busy the machine is, or
    else the log has a warning. Raises ValueError if the policy is unknown, lacks its trace, the trace is of another
    model, or the slots do not suffice.
    """
    if policy not in get_args(PolicyName):
        raise ValueError(f"placement policy is {policy!r}, expected one of {', '.join(get_args(PolicyName))}")
    request.check_experts(model.num_experts)
    if policy == "linear":
        return _linear_placement(model, request)
    if policy == "random":
        return random_placement(model, request)
    if trace is None:
        raise ValueError(f"placement policy {policy!r} needs a trace")
    check_same_model("the trace", trace, "the model", model)
    if policy == "greedy":
        return greedy_placement(trace, request)
    if request.seconds is not None and request.effort is None:
        sized = replace(request, seconds=SIZED_FOR * request.seconds)
        nominal_s = search_seconds(sized, trace.num_layers, trace.num_tokens)
        request = replace(request, effort=nominal_s / NOMINAL_SECONDS_A_LAYER)
    result = optimize(trace, request)
    for note in result.notes:
        logger.warning("placement: %s", note)
    return result.placement


def _linear_placement(model: ModelSize, request: PlanRequest) -> Placement:
    num_ranks, slots = request.num_ranks, int(request.open_slots_R.min())
    linear = Placement.linear(model.num_layers, model.num_experts, num_ranks, request.num_nodes, request.min_replicas)
    if slots < linear.slots_per_rank:
        raise ValueError(f"{slots} slots a rank are too few for a linear placement, it takes {linear.slots_per_rank}")
    return pad_slots(replace(linear, speeds=request.speeds), slots)


def pad_slots(placement: Placement, slots_per_rank: int) -> Placement:
    """The same placement with empty slots at the end of every rank."""
    old_LRs = placement.physical_to_logical_map.reshape(placement.num_layers, placement.num_ranks, -1)
    map_LRs = np.full((placement.num_layers, placement.num_ranks, slots_per_rank), EMPTY, np.int32)
    map_LRs[:, :, : placement.slots_per_rank] = old_LRs
    return replace(placement, physical_to_logical_map=map_LRs.reshape(placement.num_layers, -1))


def greedy_placement(trace: ActivationTrace, request: PlanRequest) -> Placement:
    """Greedy balancing of the trace's loads: what EPLB does, with the request's constraints."""
    load_LE = trace.load(request.load_source)
    filled_L = spread_replicas(trace, load_LE, request)
    orders = [canonical_order(trace.ids_of_layer(n), load_E, request.seed) for n, load_E in enumerate(load_LE)]
    return _by_loads(load_LE, orders, filled_L, request)


def random_placement(model: ModelSize, request: PlanRequest) -> Placement:
    """Experts and replicas at random: greedy balancing of random loads, which keeps the request's constraints."""
    load_LE = np.random.default_rng(request.seed).uniform(0.9, 1.1, (model.num_layers, model.num_experts))
    filled_L = np.full(model.num_layers, int(request.open_slots_R.sum()))
    return _by_loads(load_LE, [np.arange(model.num_experts)] * model.num_layers, filled_L, request)


def _by_loads(load_LE: np.ndarray, order_LE: list[np.ndarray], filled_L: np.ndarray, request: PlanRequest) -> Placement:
    rows = []
    for load_E, order_E, filled in zip(load_LE, order_LE, filled_L, strict=True):
        slots_Rs = greedy_slots(load_E[order_E], request, int(filled))
        rows.append(np.where(slots_Rs >= 0, order_E[np.maximum(slots_Rs, 0)], EMPTY).ravel())
    return Placement(request.num_ranks, request.num_nodes, load_LE.shape[1], np.stack(rows), speeds=request.speeds)
