"""The placements that a server's config can ask for by name."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from placement.placement import EMPTY, Placement
from placement.search.optimizer import NOMINAL_SECONDS_A_LAYER, optimize, search_seconds
from placement.search.problem import PlanRequest, canonical_order, greedy_slots
from placement.search.replica_budget import spread_replicas
from placement.traces.trace import ActivationTrace

logger = logging.getLogger(__name__)

SIZED_FOR = 0.35  # of the time budget: what is left is for a machine that is slower than nominal, or busy
PolicyName = Literal["linear", "random", "greedy", "optimized"]


def build_placement(
    policy: str,
    *,
    num_layers: int,
    num_experts: int,
    num_ranks: int,
    num_nodes: int = 1,
    slots_per_rank: int | None = None,
    min_replicas: int = 1,
    trace: ActivationTrace | None = None,
    seed: int = 0,
    time_budget_s: float = 20.0,
    load_cap: float = 1.05,
    prefer_local_replicas: bool = False,
) -> Placement:
    """A placement by policy.

    `linear` and `random` need no trace; `greedy` balances loads; `optimized` plans fan-out under `load_cap` within
    `time_budget_s`, by a search that is sized for a part of that: same arguments, same placement, however busy the
    machine, or else a warning in the log; `prefer_local_replicas` as of `PlanRequest`. `slots_per_rank` None gives as
    many as the experts and `min_replicas` need; only `linear` leaves the slots beyond that empty. Raises ValueError if
    the policy is unknown, lacks its trace, the trace is of another model, or the slots do not suffice.
    """
    if policy not in get_args(PolicyName):
        raise ValueError(f"placement policy is {policy!r}, expected one of {', '.join(get_args(PolicyName))}")
    linear = Placement.linear(num_layers, num_experts, num_ranks, num_nodes, min_replicas)
    slots = linear.slots_per_rank if slots_per_rank is None else slots_per_rank
    request = PlanRequest(
        num_ranks,
        num_nodes,
        slots,
        load_cap=load_cap,
        min_replicas=min_replicas,
        prefer_local_replicas=prefer_local_replicas,
        seed=seed,
    )
    request.check_experts(num_experts)
    if policy == "linear":
        if slots < linear.slots_per_rank:
            raise ValueError(
                f"{slots} slots a rank are too few for a linear placement, it takes {linear.slots_per_rank}"
            )
        return pad_slots(linear, slots)
    if policy == "random":
        return random_placement(num_layers, num_experts, request)
    if trace is None:
        raise ValueError(f"placement policy {policy!r} needs a trace")
    if (trace.num_layers, trace.num_experts) != (num_layers, num_experts):
        raise ValueError(
            f"the trace has {trace.num_layers} layers of {trace.num_experts} experts, "
            f"the model {num_layers} of {num_experts}"
        )
    if policy == "greedy":
        return greedy_placement(trace, request)
    sized = replace(request, seconds=SIZED_FOR * time_budget_s)
    seconds = search_seconds(sized, num_layers, trace.num_tokens)
    result = optimize(trace, replace(sized, seconds=time_budget_s, effort=seconds / NOMINAL_SECONDS_A_LAYER))
    for note in result.notes:
        logger.warning("placement: %s", note)
    return result.placement


def pad_slots(placement: Placement, slots_per_rank: int) -> Placement:
    """The same placement with empty slots at the end of every rank."""
    old_LRs = placement.physical_to_logical_map.reshape(placement.num_layers, placement.num_ranks, -1)
    map_LRs = np.full((placement.num_layers, placement.num_ranks, slots_per_rank), EMPTY, np.int32)
    map_LRs[:, :, : placement.slots_per_rank] = old_LRs
    return Placement(
        placement.num_ranks, placement.num_nodes, placement.num_experts, map_LRs.reshape(placement.num_layers, -1)
    )


def greedy_placement(trace: ActivationTrace, request: PlanRequest) -> Placement:
    """Greedy balancing of the trace's loads: what EPLB does, with the request's constraints."""
    load_LE = trace.load(request.load_source)
    filled_L = spread_replicas(trace, load_LE, request)
    orders = [canonical_order(trace.ids_of_layer(n), load_E, request.seed) for n, load_E in enumerate(load_LE)]
    return _by_loads(load_LE, orders, filled_L, request)


def random_placement(num_layers: int, num_experts: int, request: PlanRequest) -> Placement:
    """Experts and replicas at random: greedy balancing of random loads, which keeps the constraints."""
    load_LE = np.random.default_rng(request.seed).uniform(0.9, 1.1, (num_layers, num_experts))
    filled_L = np.full(num_layers, int(request.open_slots_R.sum()))
    return _by_loads(load_LE, [np.arange(num_experts)] * num_layers, filled_L, request)


def _by_loads(load_LE: np.ndarray, order_LE: list[np.ndarray], filled_L: np.ndarray, request: PlanRequest) -> Placement:
    rows = []
    for load_E, order_E, filled in zip(load_LE, order_LE, filled_L, strict=True):
        slots_Rs = greedy_slots(load_E[order_E], request, int(filled))
        rows.append(np.where(slots_Rs >= 0, order_E[np.maximum(slots_Rs, 0)], EMPTY).ravel())
    return Placement(request.num_ranks, request.num_nodes, load_LE.shape[1], np.stack(rows))
