"""What sampled steps cost with a placement, by the rule that routers use. Imports numba: for the background process.

T tokens of a step, L layers, K experts of one token, R ranks, E experts, S steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster.autopilot.estimates import Prices
from cluster.autopilot.jobs import Model
from placement.capacity.hardware import CPU_CORE, H100
from placement.capacity.residency import Offload, Residents
from placement.compiled import compiled
from placement.placement import Placement
from placement.rule.evaluate import dispatch_trace
from placement.traces.observation import PHASES, SampledStep

# A shard on CPUs whose experts fit into the last level of cache reads them from there.
CACHE_BYTES, CACHE_BYTES_PER_S = 32 * 2**20, 200e9


@dataclass(frozen=True)
class StepPrice:
    """Seconds on a shard: to read one expert's weights, to compute one pair, to take in and give back one row.

    `offload`: which experts wait for a copy first, of `expert_bytes` each. What is foreseen is taken to come in time.
    """

    expert_s: float
    pair_s: float
    row_s: float
    offload: Offload | None = None
    expert_bytes: int = 0

    @classmethod
    def of(cls, model: Model) -> StepPrice:
        """For experts of that size on nominal hardware."""
        constants = H100 if model.device == "cuda" else CPU_CORE
        cached = model.device != "cuda" and model.shard_bytes <= CACHE_BYTES
        return cls(
            expert_s=model.expert_bytes / (CACHE_BYTES_PER_S if cached else constants.memory_bytes_per_s),
            pair_s=2 * model.expert_bytes / model.weight_bytes / constants.flops_per_s,
            row_s=constants.router_token_s,
            offload=model.offload,
            expert_bytes=model.expert_bytes,
        )


@compiled()
def _of_layer(
    ids_TK: np.ndarray,
    rank_TK: np.ndarray,
    used_RE: np.ndarray,
    pairs_R: np.ndarray,
    activated_R: np.ndarray,
    rows_R: np.ndarray,
) -> None:
    """Count pairs, distinct experts and rows of each rank; `used_RE` is scratch, all False before and after."""
    num_tokens, top_k = ids_TK.shape
    for t in range(num_tokens):
        for k in range(top_k):
            rank = rank_TK[t, k]
            if rank < 0:
                continue
            pairs_R[rank] += 1
            if not used_RE[rank, ids_TK[t, k]]:
                used_RE[rank, ids_TK[t, k]] = True
                activated_R[rank] += 1
            first = True
            for j in range(k):
                if rank_TK[t, j] == rank:
                    first = False
            if first:
                rows_R[rank] += 1
    for t in range(num_tokens):
        for k in range(top_k):
            if rank_TK[t, k] >= 0:
                used_RE[rank_TK[t, k], ids_TK[t, k]] = False


def price_steps(placement: Placement, steps: Sequence[SampledStep], price: StepPrice) -> Prices:
    """What each step costs: the slowest shard of each layer, added over layers. Loads begin at zero in each step.

    Of a step that was sampled in part, pairs and rows are scaled to all of its tokens. Shards that offload begin with
    the hottest experts of all the steps in memory, and each step finds what the one before left.
    """
    num_ranks = placement.num_ranks
    seconds_SL = np.zeros((len(steps), placement.num_layers))
    fan_out_S, balancedness_S, layers_S = np.zeros((3, len(steps)))  # `layers_S`: with rows; few routers guess by MTP
    used_RE = np.zeros((num_ranks, placement.num_experts), np.bool_)
    copies = None if price.offload is None else _Copies(placement, steps, price.offload, price.expert_bytes)
    found_S, copy_S = np.zeros((2, len(steps)))
    usable_R = (placement.physical_to_logical_map.reshape(placement.num_layers, num_ranks, -1) >= 0).any((0, 2))
    for s, step in enumerate(steps):
        scale = step.num_tokens / max(len(step.topk_ids), 1)
        rank_LTK = dispatch_trace(placement, step.topk_ids)
        for layer, rank_TK in enumerate(rank_LTK):
            ids_TK = np.ascontiguousarray(step.topk_ids[:, layer], dtype=np.int32)
            pairs_R, activated_R, rows_R = np.zeros((3, num_ranks), np.int64)
            _of_layer(ids_TK, rank_TK, used_RE, pairs_R, activated_R, rows_R)
            work_R = np.maximum(activated_R * price.expert_s, pairs_R * scale * price.pair_s)
            seconds_R = work_R + rows_R * scale * price.row_s
            if copies is not None:
                copy_R = copies.wait_s(layer, ids_TK, rank_TK)
                seconds_R += copy_R
                copy_S[s] += copy_R[seconds_R.argmax()]
            seconds_SL[s, layer] = seconds_R.max()
            fan_out_S[s] += rows_R.sum() / max(len(ids_TK), 1)
            balancedness_S[s] += pairs_R[usable_R].mean() / max(pairs_R.max(), 1)
            layers_S[s] += pairs_R.any()
        if copies is not None:
            found_S[s] = copies.found_since()
    layers_S = np.maximum(layers_S, 1)
    weight_S = np.array([step.weight for step in steps])
    prices = Prices(seconds_SL, fan_out_S / layers_S, balancedness_S / layers_S, weight_S)
    return prices if copies is None else replace(prices, found_S=found_S, copy_S=copy_S)


class _Copies:
    """Which experts the shards wait for, step after step."""

    def __init__(self, placement: Placement, steps: Sequence[SampledStep], offload: Offload, expert_bytes: int) -> None:
        load_LE = np.zeros((placement.num_layers, placement.num_experts))
        for step in steps:
            for layer in range(placement.num_layers):
                ids = step.topk_ids[:, layer]
                load_LE[layer] += step.weight * np.bincount(ids[ids >= 0], minlength=placement.num_experts)
        self._residents = Residents(placement, load_LE, offload)
        self._offload, self._expert_bytes = offload, expert_bytes
        self._used_IRE = np.zeros((1, placement.num_ranks, placement.num_experts), np.bool_)
        self._uses, self._misses = 0, 0

    def wait_s(self, layer: int, ids_TK: np.ndarray, rank_TK: np.ndarray) -> np.ndarray:
        """float64 [R]: seconds of each shard in a layer of the next step."""
        sent_TK = rank_TK >= 0
        self._used_IRE[:] = False
        self._used_IRE[0, rank_TK[sent_TK], ids_TK[sent_TK]] = True
        missing_R = self._residents.use(layer, self._used_IRE)[0]
        return self._offload.wait_s(missing_R, self._expert_bytes, math.inf)

    def found_since(self) -> float:
        """Share of the experts asked for that were in memory, since it was asked last."""
        uses, misses = self._residents.uses - self._uses, self._residents.misses - self._misses
        self._uses, self._misses = self._residents.uses, self._residents.misses
        return 1 - misses / max(uses, 1)


def recut(reference: Sequence[SampledStep], like: Sequence[SampledStep], seed: int = 0) -> list[SampledStep]:
    """Steps of the same sizes and phases as `like`, made of the reference's tokens, those together that were so.

    What a placement costs depends on how many tokens a step has, so only steps of equal sizes can be compared.
    """
    rng = np.random.default_rng(seed)
    pools = []
    for phase in range(len(PHASES)):
        parts = [step.topk_ids[step.prefill_T == bool(phase)] for step in reference]
        pools.append(np.concatenate(parts) if parts else np.zeros((0, 0, 0), np.int16))
    anything = np.concatenate([pool for pool in pools if len(pool)])
    cut = []
    for step in like:
        picked = []
        for phase, pool in enumerate(pools):
            wanted = int((step.prefill_T == bool(phase)).sum())
            pool = pool if len(pool) else anything
            if wanted:
                start = int(rng.integers(len(pool)))
                picked.append(pool[(start + np.arange(wanted)) % len(pool)])
        ids_TLK = np.concatenate(picked) if picked else anything[:0]
        cut.append(SampledStep(step.number, step.at_s, step.num_tokens, ids_TLK, np.sort(step.prefill_T), step.weight))
    return cut
