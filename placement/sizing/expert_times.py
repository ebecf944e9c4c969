"""The expert half of a step on any number of shards, from `placement.capacity.step_cost` on a made-up trace.

T tokens of a step, L layers, K experts of a token, E experts.

Routers are not in lockstep: while one attends, shards compute for others. Here they form groups that take turns. A
group whose routers think for z seconds between two layers, and whose rows take a shard s seconds, comes round every
`z + s` or, if shards are busier than that, every `groups * s`, of which they are taken to be busy for four fifths at
most. Few large groups share reads of weights, many small ones wait for fewer rows; the best number counts. One group is
lockstep, as in expert parallelism.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from placement.capacity.hardware import ModelShape
from placement.capacity.step_cost import step_cost
from placement.placement import Placement
from placement.sizing.gpus import Gpu
from placement.sizing.memory import DTYPE_BYTES, ROWS_PER_DISPATCH
from placement.sizing.model import ModelFacts
from placement.topology import Topology
from placement.traces.trace import ActivationTrace

BUSY_AT_MOST = 0.8
_TRACE_TOKENS, _TRACE_LAYERS = 1024, 2
_GRID = (1, 4, 16, 64, 256, 1024, 4096)  # tokens; beyond, everything grows in proportion


@dataclass(frozen=True)
class Half:
    """The GPUs that hold experts: `shards` of them with `replicas` of each expert, asked by `routers`.

    `gpus` is all of both kinds, which decides whether rows leave a node. `lockstep`: routers and shards are the same
    GPUs and step together, as in expert parallelism. `workers`: GPUs of a router, which divide its rows.
    """

    shards: int
    routers: int
    gpus: int
    replicas: int = 1
    lockstep: bool = False
    workers: int = 1


class LayerTime(NamedTuple):
    """Seconds of one MoE layer's expert half; `wait_s` is what shards are busy with other groups' rows."""

    router_s: float
    wire_s: float
    shard_s: float
    wait_s: float

    @property
    def total_s(self) -> float:
        return self.router_s + self.wire_s + self.shard_s + self.wait_s


class _Sample(NamedTuple):
    """Of one layer: seconds of the slowest shard, bytes that routers send and take, those of the busiest shard."""

    shard_s: float
    wire_bytes: float
    busiest_bytes: float


@dataclass(frozen=True)
class ExpertTimes:
    """Times of one model on one kind of GPU. `skew` is the sigma of the experts' lognormal popularity.

    Costs are taken at powers of four of tokens, never falling from one to the next, and linear between: they grow with
    tokens whatever the samples say. Placements are linear, as a service's first one is.
    """

    facts: ModelFacts
    gpu: Gpu
    skew: float

    def layer(self, own: float, total: float, think_s: float, half: Half) -> LayerTime:
        """One layer of a router's step of `own` tokens, with `total` of all routers, whose layers begin `think_s` after
        the last one's end.
        """
        total = max(total, own)
        if half.lockstep or half.routers == 1:
            return self._of_groups(own, total, think_s, half, 1)
        groups = {half.routers, *(2**power for power in range(half.routers.bit_length()))}
        return min((self._of_groups(own, total, think_s, half, g) for g in groups), key=lambda time: time.total_s)

    def _of_groups(self, own: float, total: float, think_s: float, half: Half, groups: int) -> LayerTime:
        constants, links = self.gpu.constants, self.gpu.links
        link = links.node if half.gpus <= self.gpu.gpus_per_node else links.rack
        beside = (half.routers / groups - 1) / (half.routers - 1) if half.routers > 1 else 0.0
        sample = self._between(max(own + (total - own) * beside, 1.0), half)
        other = self._between(max(total / groups, 1.0), half) if groups > 1 else sample
        members = max(half.routers / groups, 1.0) * half.workers
        share = own / half.workers
        messages = max(-(-share // ROWS_PER_DISPATCH), 1.0)
        router_s = constants.router_s + constants.router_token_s * share
        wire_s = max(sample.busiest_bytes, sample.wire_bytes / members) / link.bandwidth_bytes_per_s
        wire_s += 2 * link.latency_s * messages
        alone_s = router_s + wire_s + sample.shard_s
        round_s = ((groups - 1) * other.shard_s + sample.shard_s) / BUSY_AT_MOST if groups > 1 else 0.0
        return LayerTime(router_s, wire_s, sample.shard_s, max(0.0, round_s - think_s - alone_s))

    def _between(self, tokens: float, half: Half) -> _Sample:
        facts = self.facts
        shape = self._engine_shape if half.lockstep else self._shape
        samples = _samples(shape, facts.num_experts, facts.top_k, self.skew, self.gpu, half.shards, half.replicas)
        above = next((at for at, size in enumerate(_GRID) if tokens <= size), None)
        if above == 0:
            return samples[0]
        if above is None:
            return _Sample(*(value * tokens / _GRID[-1] for value in samples[-1]))
        share = (tokens - _GRID[above - 1]) / (_GRID[above] - _GRID[above - 1])
        low, high = samples[above - 1], samples[above]
        return _Sample(*(a + share * (b - a) for a, b in zip(low, high, strict=True)))

    @functools.cached_property
    def _shape(self) -> ModelShape:
        """The model as `step_cost` takes it; an expert's biases and scales count as weights."""
        return self._shape_of(self.facts.expert_bytes)

    @functools.cached_property
    def _engine_shape(self) -> ModelShape:
        """The same where experts and attention are in one engine, which reads experts as they are stored."""
        return self._shape_of(self.facts.engine_expert_bytes)

    def _shape_of(self, expert_bytes: int) -> ModelShape:
        D, I = self.facts.hidden_size, self.facts.expert_width
        return ModelShape(D, I, expert_bytes / (3 * D * I), DTYPE_BYTES)


@functools.lru_cache(maxsize=4096)
def _samples(
    shape: ModelShape, num_experts: int, top_k: int, skew: float, gpu: Gpu, shards: int, replicas: int
) -> tuple[_Sample, ...]:
    """One for each size of the grid, never falling."""
    found: list[_Sample] = []
    placement = Placement.linear(_TRACE_LAYERS, num_experts, shards, min_replicas=replicas)
    for tokens in _GRID:
        cost = step_cost(
            made_up_trace(num_experts, top_k, skew),
            placement,
            model=shape,
            constants=gpu.constants,
            topology=Topology.uniform(shards, links=gpu.links),
            tokens=tokens,
            router_nodes=[0],
            batches=4 if tokens <= 16 else 1,
        )
        wire_bytes = sum(cost.link_bytes.values()) / _TRACE_LAYERS
        busiest = cost.busiest_pairs / (tokens * top_k)
        sample = _Sample(float(cost.shard_s.mean()), wire_bytes, busiest * wire_bytes)
        found.append(_Sample(*(max(pair) for pair in zip(sample, found[-1], strict=True))) if found else sample)
    return tuple(found)


@functools.lru_cache(maxsize=16)
def made_up_trace(num_experts: int, top_k: int, skew: float) -> ActivationTrace:
    """Tokens whose experts are drawn without replacement, by popularity (Gumbel's trick)."""
    E, K = num_experts, top_k
    rng = np.random.default_rng(0)
    ids_TLK = np.empty((_TRACE_TOKENS, _TRACE_LAYERS, K), np.int16)
    for layer in range(_TRACE_LAYERS):
        score_TE = rng.gumbel(size=(_TRACE_TOKENS, E)) + skew * rng.normal(size=E)
        ids_TLK[:, layer] = np.argpartition(score_TE, E - K, axis=1)[:, E - K :]
    return ActivationTrace(ids_TLK, E)
