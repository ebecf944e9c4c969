"""How many replicas each layer gets from one budget for all layers.

L layers, E experts, R ranks, X offers of a layer. Layers differ in what a replica gains: little where routing is even.
Each layer offers its replicas in order of what they save, and the best offers of all layers are taken.
"""

from __future__ import annotations

import numpy as np

from placement.search.balance import even_split_load, greedy_balance
from placement.search.problem import PlanRequest
from placement.search.swaps.bitsets import token_bits
from placement.traces.trace import ActivationTrace

# What balance is worth against fan-out: visits a token for one unit of the largest rank load over the mean.
LOAD_WORTH = 10.0


def spread_replicas(trace: ActivationTrace, load_LE: np.ndarray, request: PlanRequest) -> np.ndarray:
    """int64 [L]: how many slots of each layer may hold an expert.

    Without a budget, all. With one, the first `min_replicas` replicas of every expert, and as many more as the budget
    pays for, in the layers where they gain most.
    """
    usable = int(np.minimum(request.open_slots_R, trace.num_experts).sum())
    filled_L = np.full(trace.num_layers, usable, np.int64)
    if request.replica_budget is None:
        return filled_L
    if request.replica_budget < 0:
        raise ValueError(f"replica_budget is {request.replica_budget}, expected 0 or more")
    base = trace.num_experts * request.min_replicas
    gains_LX = np.stack([marginal_gains(trace, layer, load_LE[layer], request) for layer in range(trace.num_layers)])
    filled_L[:] = base
    room = usable - base
    budget = min(request.replica_budget, room * trace.num_layers)
    # Offers of a layer never get better, so the best offers are prefixes of the layers' lists.
    gains_LX = np.minimum.accumulate(gains_LX[:, :room], axis=1)
    order = np.argsort(-gains_LX.ravel(), kind="stable")[:budget]
    np.add.at(filled_L, order // max(room, 1), 1)
    return filled_L


def marginal_gains(trace: ActivationTrace, layer: int, load_E: np.ndarray, request: PlanRequest) -> np.ndarray:
    """float64 [X]: what each further replica of a layer saves, in visits a token, in greedy order.

    Judged from greedy balancing without replicas. A replica of expert e on rank r saves a visit for tokens that visit r
    anyway and want nothing but e from e's rank; and it halves e's share of the largest load.
    """
    num_offers = max(
        0, int(np.minimum(request.open_slots_R, trace.num_experts).sum()) - trace.num_experts * request.min_replicas
    )
    gain_X = np.zeros(num_offers)
    slots_Rs = greedy_balance(
        load_E,
        request.open_slots_R,
        request.node_of_rank_R,
        request.num_nodes,
        np.ones(request.num_ranks),
        request.min_replicas,
        trace.num_experts * request.min_replicas,
    )
    saved_N = np.zeros(0)
    if trace.has_sets:
        ids_TK = trace.ids_of_layer(layer)
        bits_EW = token_bits(ids_TK, trace.num_experts)
        any_RW = np.zeros((request.num_ranks, bits_EW.shape[1]), np.uint64)
        one_RW = np.zeros_like(any_RW)
        for rank, experts in enumerate(slots_Rs):
            two_W = np.zeros(bits_EW.shape[1], np.uint64)
            for expert in experts[experts >= 0]:
                two_W |= any_RW[rank] & bits_EW[expert]
                any_RW[rank] |= bits_EW[expert]
            one_RW[rank] = any_RW[rank] & ~two_W
        saved = []
        for rank, experts in enumerate(slots_Rs):
            for expert in experts[experts >= 0]:
                alone_W = bits_EW[expert] & one_RW[rank]
                counts_R = np.bitwise_count(any_RW & alone_W[None, :]).sum(1)
                counts_R[rank] = 0
                saved.append(counts_R.max())
        saved_N = np.sort(np.array(saved, float))[::-1] / trace.num_tokens
    gain_X[: min(num_offers, len(saved_N))] = saved_N[:num_offers]
    # Balance: how much the largest rank load over the mean falls with each further replica, by greedy counts.
    count_E = np.full(trace.num_experts, request.min_replicas)
    mean = max(load_E.sum() / max(int((request.open_slots_R > 0).sum()), 1), 1e-12)
    floor = max(float(even_split_load(slots_Rs, load_E).max()) / mean, 1.0)
    for offer in range(num_offers):
        hottest = int(np.argmax(load_E / count_E))
        before = max(load_E[hottest] / count_E[hottest] / mean, 1.0)
        count_E[hottest] += 1
        after = max(float((load_E / count_E).max()) / mean, 1.0)
        gain_X[offer] += LOAD_WORTH * (before - after) / floor
    return gain_X
