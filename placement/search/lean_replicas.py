"""Slots that are not filled for the sake of it: a plan without the replicas that cost steps more than they save.

T tokens, K experts of one, E experts, R ranks, M mixes of the traffic: all of it, then each domain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from placement.capacity.replica_worth import Worth, layer_seconds, without_idle_replicas
from placement.placement import EMPTY, Placement
from placement.rule.evaluate import dispatch_trace
from placement.search.problem import PlanRequest, domain_excess
from placement.traces.trace import ActivationTrace

TRIAL_SHARE = 0.1  # of a layer's search, for each number of replicas that is tried
TRIAL_TOLERANCE = 0.03  # above the caps: what a whole search gets rid of


def filled_that_pays(
    plan: Callable[[int], np.ndarray],
    trace: ActivationTrace,
    layer: int,
    request: PlanRequest,
    worth: Worth,
    most: int,
) -> tuple[int, int]:
    """How many slots of a layer to fill for the fastest steps, and how many plans it took to tell.

    `plan` gives slots int32 [R, s] for a number of slots to fill: `most`, none but the needed, and half of the way are
    tried. Fewer must be about as even as `most`, or within the caps. Single replicas would not tell: what one rank no
    longer reads is saved only once no other rank reads as much.
    """
    sizes, least = sizes_of(worth, trace), trace.num_experts * request.min_replicas
    if not sizes or most <= least:
        return most, 0
    worth = replace(worth, step_tokens=sizes, prefer_local_replicas=request.prefer_local_replicas)
    ids_T1K = trace.topk_ids[:, layer : layer + 1]
    only = ActivationTrace(ids_T1K, trace.num_experts, domain=trace.domain, domains=trace.domains)
    tried = list(dict.fromkeys([most, (most + least) // 2, least]))
    seconds_B, limit_M = list[np.ndarray](), np.zeros(0)
    for filled in tried:
        slots_Rs = plan(filled)
        map_1S = np.where(slots_Rs >= 0, slots_Rs, EMPTY).reshape(1, -1)
        placement = Placement(request.num_ranks, request.num_nodes, trace.num_experts, map_1S, speeds=request.speeds)
        load_M = _load_in_caps(placement, only, 0, request)
        if filled == most:
            limit_M = np.maximum(load_M, 1.0)
        within = bool((load_M <= limit_M + TRIAL_TOLERANCE).all())
        seconds_B.append(layer_seconds(placement, only, 0, worth) if within else np.full(len(sizes), np.inf))
    relative = [float((each_B / seconds_B[0]).mean()) for each_B in seconds_B]
    return tried[int(np.argmin(relative))], len(tried)


def narrowed(request: PlanRequest, filled: int) -> PlanRequest:
    """The request with no more slots than are to be filled, those with most losing theirs first.

    Else ranks would hold unlike numbers of experts, and in small steps the one with most is the slowest.
    """
    slots_R = request.open_slots_R.copy()
    for _ in range(int(slots_R.sum()) - filled):
        slots_R[len(slots_R) - 1 - int(np.argmax(slots_R[::-1]))] -= 1
    return replace(request, slots_per_rank=tuple(slots_R.tolist()))


def lean_replicas(
    placement: Placement, trace: ActivationTrace, request: PlanRequest, worth: Worth, stopped: Callable[[], bool]
) -> Placement:
    """The placement without replicas that do not pay in steps, as far as the request's limits allow.

    Every rank's load stays within the cap, or where it was if that is above; so it does for each domain. Sizes of steps
    that the trace has too few tokens for do not count.
    """
    sizes = sizes_of(worth, trace)
    if not sizes:
        return placement
    worth = replace(worth, step_tokens=sizes, prefer_local_replicas=request.prefer_local_replicas)
    limit_LM = [np.maximum(_load_in_caps(placement, trace, n, request), 1.0) for n in range(trace.num_layers)]

    def allowed(tried: Placement, layer: int) -> bool:
        if request.min_replicas > 1 and not _is_spread(tried, layer, request.min_replicas):
            return False
        return bool((_load_in_caps(tried, trace, layer, request) <= limit_LM[layer] + 1e-9).all())

    return without_idle_replicas(placement, trace, worth, request.min_replicas, allowed=allowed, stopped=stopped)


def sizes_of(worth: Worth, trace: ActivationTrace) -> tuple[int, ...]:
    """The sizes of steps that the trace has enough tokens for."""
    return tuple(tokens for tokens in worth.step_tokens if trace.has_sets and tokens <= trace.num_tokens)


def _load_in_caps(placement: Placement, trace: ActivationTrace, layer: int, request: PlanRequest) -> np.ndarray:
    """float64 [M]: the largest rank load over the mean (by speed), in caps, of each mix."""
    only = replace(placement, physical_to_logical_map=placement.physical_to_logical_map[layer : layer + 1])
    rank_TK = dispatch_trace(only, trace.topk_ids[:, layer : layer + 1], request.prefer_local_replicas)[0]
    usable_R = (only.physical_to_logical_map.reshape(only.num_ranks, -1) >= 0).any(1)
    share_R = placement.speed_R * usable_R / (placement.speed_R * usable_R).sum()
    domains = np.zeros(0, np.int64)
    if trace.domain is not None and len(trace.domains) > 1:
        domains = np.unique(trace.domain)
    masks = [np.ones(len(rank_TK), bool), *(trace.domain == each for each in domains)]
    caps = [request.load_cap, *[1 + domain_excess(request.load_cap, len(domains))] * len(domains)]
    above = []
    for mask, cap in zip(masks, caps, strict=True):
        rank_P = rank_TK[mask]
        load_R = np.bincount(rank_P[rank_P >= 0], minlength=only.num_ranks)
        above.append((load_R / np.maximum(load_R.sum() * share_R, 1e-9)).max() / cap)
    return np.array(above)


def _is_spread(placement: Placement, layer: int, min_replicas: int) -> bool:
    """Whether every expert stands on enough different nodes, or ranks where there is one node."""
    on_ER = placement.slots_LER[layer] >= 0
    on_ED = on_ER
    if placement.num_nodes > 1:
        on_ED = on_ER.reshape(placement.num_experts, placement.num_nodes, -1).any(2)
    return bool((on_ED.sum(1) >= min_replicas).all())
