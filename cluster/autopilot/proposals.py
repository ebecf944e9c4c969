"""A placement for recent traffic, near the one in force: layers change only where that pays. Imports numba.

S sampled steps, L layers, R ranks, s slots of a rank, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cluster.autopilot.estimates import saving, share_of
from cluster.autopilot.jobs import Model, PlanJob, Proposal
from cluster.autopilot.pricing import StepPrice, price_steps
from placement.placement import Placement
from placement.policy import build_placement
from placement.search.few_copies.relabel import relabel
from placement.search.few_copies.resize import copies_between
from placement.search.problem import PlanRequest
from placement.search.refresh import RefreshLimits, searched
from placement.traces.observation import PHASES, Observation, SampledStep, as_trace

MOVES = (2, 8, 32)  # copies a layer that the searches near the present placement may make
LIKELY = 1.0  # standard errors for one layer; the whole is judged again, on other steps
STRETCHES = 12  # of time: a half to plan with, a quarter to choose layers by, a quarter to judge the whole by


def propose(job: PlanJob) -> Proposal:
    """The best mixture, layer by layer, of the present placement and of searches near it and from nothing.

    A layer changes where what it saves on steps that the search has not seen is beyond noise, and in `job.steps` more
    than its copies cost. ValueError without sampled steps.
    """
    steps = sorted((step for step in job.seen.sampled if len(step.topk_ids)), key=lambda step: step.at_s)
    if len(steps) < STRETCHES:
        raise ValueError(f"{len(steps)} steps were sampled, a plan needs {STRETCHES}")
    part_S = np.arange(len(steps)) * STRETCHES // len(steps) % 4

    def some(*parts: int) -> list[SampledStep]:
        return [step for step, part in zip(steps, part_S, strict=True) if part in parts]

    current = with_slots(job.current, job.slots_per_rank)
    price = StepPrice.of(job.model)
    searched = replace(job, current=current, seen=replace(job.seen, sampled=tuple(some(0, 1))))
    candidates = _candidates(searched)
    placement = _mixed(job, current, candidates, some(2), price)
    before, after = (price_steps(each, some(3), price) for each in (current, placement))
    return Proposal(placement, copies_between(current, placement), saving(before, after), before.mean())


def prepare() -> None:
    """Run every compiled function once, on made-up traffic of eight experts: later calls find the machine code."""
    rng = np.random.default_rng(0)
    steps = tuple(
        SampledStep(
            *(number, float(number), 8),
            topk_ids=rng.permuted(np.tile(np.arange(8, dtype=np.int16), (8, 1, 1)), axis=2)[:, :, :2].copy(),
            prefill_T=np.zeros(8, np.bool_),
        )
        for number in range(4 * STRETCHES)
    )
    ids = np.concatenate([step.topk_ids for step in steps])
    counts_PLE = np.zeros((len(PHASES), 1, 8), np.int64)
    counts_PLE[0, 0] = np.bincount(ids.ravel(), minlength=8)
    seen = Observation((0,), counts_PLE, np.array([len(ids), 0]), len(steps), steps)
    job = PlanJob(
        model=Model(1, 1.0, 8, "cpu"),
        current=Placement.linear(1, 8, 4, 1, 1),
        seen=seen,
        slots_per_rank=3,
        min_replicas=1,
        load_cap=1.1,
        copy_s=0.0,
        steps=1.0,
        max_copies=None,
        fresh_s=0.0,
    )
    propose(job)
    _fresh(job, effort=0.001)  # not by seconds: compiling would take them all


def _candidates(job: PlanJob) -> list[Placement]:
    trace = as_trace(job.seen)
    limits = RefreshLimits(load_cap=job.load_cap, min_replicas=job.min_replicas)
    found = [searched(job.current, trace, replace(limits, max_moves=moves)) for moves in MOVES]
    if job.fresh_s > 0:
        found.append(_fresh(job))
    return found


def _fresh(job: PlanJob, effort: float | None = None) -> Placement:
    """A plan from nothing on the ranks that have experts, with ranks named so that most experts stay."""
    current = job.current
    usable_R = np.flatnonzero(used_slots(current).any(0))
    request = PlanRequest(
        num_ranks=len(usable_R),
        num_nodes=1,
        slots_per_rank=job.slots_per_rank,
        load_cap=job.load_cap,
        min_replicas=job.min_replicas,
        seconds=job.fresh_s if effort is None else None,
        effort=effort,
    )
    planned = build_placement("optimized", request, current, as_trace(job.seen))
    shape = (current.num_layers, current.num_ranks, planned.slots_per_rank)
    map_LRs = np.full(shape, -1, np.int32)
    map_LRs[:, usable_R] = planned.physical_to_logical_map.reshape(current.num_layers, len(usable_R), -1)
    kinds = ["used" if rank in usable_R else ("empty", rank) for rank in range(current.num_ranks)]
    target = Placement(current.num_ranks, 1, current.num_experts, map_LRs.reshape(current.num_layers, -1))
    return with_slots(relabel(current, target, kinds), current.slots_per_rank, current)


def _mixed(
    job: PlanJob, current: Placement, candidates: Sequence[Placement], steps: list[SampledStep], price: StepPrice
) -> Placement:
    """Each layer of whichever candidate is worth most there; layers with most seconds a copy first."""
    before = price_steps(current, steps, price)
    offers: list[tuple[float, int, int, Placement]] = []
    for candidate in candidates:
        after = price_steps(candidate, steps, price)
        for layer in range(current.num_layers):
            copies = copies_between(one_layer(current, layer), one_layer(candidate, layer))
            before_S, after_S = before.seconds_SL[:, layer], after.seconds_SL[:, layer]
            share = share_of(before_S - after_S, before_S, before.weight_S)
            saved_s = share.value * float(np.average(before_S, weights=before.weight_S))
            if share.value > LIKELY * share.noise and saved_s * job.steps > copies * job.copy_s:
                offers.append((saved_s - copies * job.copy_s / max(job.steps, 1), layer, copies, candidate))
    best: dict[int, tuple[float, int, int, Placement]] = {}
    for offer in offers:
        if offer[1] not in best or offer[0] > best[offer[1]][0]:
            best[offer[1]] = offer
    map_LS = current.physical_to_logical_map.copy()
    left = job.max_copies
    for _, layer, copies, candidate in sorted(best.values(), key=lambda offer: -offer[0] / max(offer[2], 1)):
        if left is not None:
            if copies > left:
                continue
            left -= copies
        map_LS[layer] = candidate.physical_to_logical_map[layer]
    return replace(current, physical_to_logical_map=map_LS)


def used_slots(placement: Placement) -> np.ndarray:
    """int64 [L, R]: slots that hold an expert."""
    map_LRs = placement.physical_to_logical_map.reshape(placement.num_layers, placement.num_ranks, -1)
    return (map_LRs >= 0).sum(2)


def one_layer(placement: Placement, layer: int) -> Placement:
    """That layer alone."""
    return replace(placement, physical_to_logical_map=placement.physical_to_logical_map[layer : layer + 1])


def with_slots(placement: Placement, slots_per_rank: int, like: Placement | None = None) -> Placement:
    """The same experts on the same ranks with so many slots in a layer, or more if they need them.

    `like`: whose nodes and speeds to take.
    """
    num_layers, num_ranks = placement.num_layers, placement.num_ranks
    map_LRs = placement.physical_to_logical_map.reshape(num_layers, num_ranks, -1)
    width = max(slots_per_rank, int(used_slots(placement).max()))
    ordered_LRs = np.take_along_axis(map_LRs, np.argsort(map_LRs < 0, axis=2, kind="stable"), 2)
    if width > map_LRs.shape[2]:
        ordered_LRs = np.pad(ordered_LRs, ((0, 0), (0, 0), (0, width - map_LRs.shape[2])), constant_values=-1)
    like = placement if like is None else like
    map_LS = np.ascontiguousarray(ordered_LRs[:, :, :width]).reshape(num_layers, -1)
    return replace(like, physical_to_logical_map=map_LS)
