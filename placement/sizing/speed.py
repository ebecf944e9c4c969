"""Steps of a router or an engine by a roofline, and where a given load settles.

In a steady state a router's step takes t seconds and answers what came meanwhile: `rate * osl * t` tokens are decoded
and `rate * isl * t` tokens of prompts are computed in it. The time of such a step grows with t, and the smallest t that
it does not exceed is the mean time between tokens.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

from placement.sizing.demand import Demand
from placement.sizing.expert_times import ExpertTimes, Half, LayerTime
from placement.sizing.gpus import Gpu
from placement.sizing.model import SERVED_BYTES, ModelFacts

# Estimated: launches of a layer's attention and norms that nothing hides, and scheduling and sampling of a step.
LAYER_LAUNCH_S = 20e-6
STEP_FIXED_S = 1e-3
BURST = 2.0  # standard deviations of the number of sequences (Poisson) that there is room for


class StepTime(NamedTuple):
    """Seconds of a mean step, by what they go to. `reduce_s`: adding up what a router's workers computed."""

    weights_s: float
    attention_s: float
    reduce_s: float
    fixed_s: float
    experts: LayerTime
    moe_layers: int

    @property
    def total_s(self) -> float:
        dense_s = self.weights_s + self.attention_s + self.reduce_s + self.fixed_s
        return dense_s + self.moe_layers * self.experts.total_s


@dataclass(frozen=True)
class Point:
    """Where a load settles on one router among equals.

    Attributes:
        step: the mean step; its total is the mean time between tokens.
        ttft_s: mean time to the first token: a step that runs, the queue, the prompt's own steps.
        longest_step_s: a step with as much of a prompt as fits.
        sequences: answered at a time, on average; `peak_sequences` with room for bursts.
        prefill_load: share of the time that prompts take.
    """

    step: StepTime
    ttft_s: float
    longest_step_s: float
    sequences: float
    peak_sequences: int
    prefill_load: float

    @property
    def tpot_s(self) -> float:
        return self.step.total_s


@dataclass(frozen=True)
class Roofline:
    """Times of a model on a kind of GPU under a demand."""

    facts: ModelFacts
    gpu: Gpu
    demand: Demand

    @functools.cached_property
    def experts(self) -> ExpertTimes:
        return ExpertTimes(self.facts, self.gpu, self.demand.skew)

    def step(self, decode: float, prefill: float, total: float, half: Half) -> StepTime:
        """One router's step of `decode` sequences and `prefill` tokens of prompts, with `total` tokens of all."""
        facts, constants = self.facts, self.gpu.constants
        own = decode + prefill
        read_s = self._dense_bytes / constants.memory_bytes_per_s
        computed = 2 * (self._dense_parameters * own + facts.vocab_size * facts.hidden_size * decode)
        weights_s = max(read_s, computed / constants.flops_per_s) / half.workers
        attention_s = self._attention_s(decode, prefill, half.workers)
        reduce_s = self._reduce_s(own, half.workers)
        fixed_s = facts.num_layers * LAYER_LAUNCH_S + STEP_FIXED_S
        think_s = (weights_s + attention_s + reduce_s + fixed_s) / facts.moe_layers
        layer = self.experts.layer(own, total, think_s, half)
        return StepTime(weights_s, attention_s, reduce_s, fixed_s, layer, facts.moe_layers)

    def mean_step(self, step_s: float, half: Half) -> StepTime:
        """The step that answers what came in `step_s` seconds; of at least one sequence."""
        demand = self.demand
        each = demand.rate / half.routers * step_s
        decode, prefill = max(each * demand.osl, 1.0), each * demand.isl
        return self.step(decode, prefill, demand.rate * step_s * demand.context, half)

    def keeps_up(self, half: Half) -> bool:
        """Whether what comes in a step of the longest allowed time between tokens takes no longer than that."""
        limit_s = self.demand.tpot_ms / 1e3
        return self.mean_step(limit_s, half).total_s <= limit_s

    def settle(self, chunk: int, half: Half) -> Point | None:
        """Where the load settles with steps of at most `chunk` tokens, None if it does not within the limits."""
        if not self.keeps_up(half):
            return None
        step = self.settled_step(half)
        demand, step_s = self.demand, step.total_s
        each = demand.rate / half.routers
        decoding = max(each * demand.osl * step_s, 1.0)
        room = chunk - decoding
        if room < 1:
            return None
        part = min(demand.isl, room)
        others = each * step_s * demand.context * (half.routers - 1)
        longest_s = self.step(decoding, part, decoding + part + others, half).total_s
        work_s = demand.isl / part * longest_s
        load = each * work_s
        if load >= 1:
            return None
        queue_s = work_s * load / (2 * (1 - load))  # M/D/1
        ttft_s = step_s / 2 + queue_s + math.ceil(demand.isl / part) * longest_s
        if ttft_s > demand.ttft_ms / 1e3:
            return None
        sequences = each * (demand.osl * step_s + ttft_s)
        peak = math.ceil(sequences + BURST * math.sqrt(sequences))
        return Point(step, ttft_s, longest_s, sequences, peak, load)

    def settled_step(self, half: Half) -> StepTime:
        """The mean step where the load settles, reached from below."""
        found = self._settled.get(half)
        if found is None:
            found = self.mean_step(0.0, half)
            for _ in range(100):
                before_s = found.total_s
                found = self.mean_step(before_s, half)
                if found.total_s - before_s <= 1e-4 * before_s:
                    break
            self._settled[half] = found
        return found

    @functools.cached_property
    def _settled(self) -> dict[Half, StepTime]:
        return {}

    @functools.cached_property
    def _dense_bytes(self) -> float:
        """Bytes that every step reads: all of a router's weights but the embedding, of which it reads rows."""
        facts = self.facts
        tied = not any(each.part == "output head" for each in facts.tensors)
        looked_up = 0 if tied else SERVED_BYTES * facts.vocab_size * facts.hidden_size
        return facts.held_bytes("router") - looked_up

    @functools.cached_property
    def _dense_parameters(self) -> float:
        """Parameters that every token is multiplied with on a router, the output head aside."""
        return sum(
            each.parameters
            for each in self.facts.tensors
            if each.side == "router" and each.part not in ("embedding", "output head")
        )

    def _reduce_s(self, own: float, workers: int) -> float:
        """Two all-reduces in each layer, after attention and after the experts; workers are in one node."""
        if workers == 1:
            return 0.0
        link = self.gpu.links.node
        nbytes = 2 * (workers - 1) / workers * own * self.facts.hidden_size * SERVED_BYTES
        return 2 * self.facts.num_layers * (nbytes / link.bandwidth_bytes_per_s + 2 * link.latency_s)

    def _attention_s(self, decode: float, prefill: float, workers: int) -> float:
        demand, constants = self.demand, self.gpu.constants
        total_s = 0.0
        for group in self.facts.attention:
            read = group.read(demand.mean_context)
            cached_bytes = read * group.token_values * demand.kv_value_bytes / min(workers, group.kv_heads)
            cached_bytes += group.cached(demand.mean_context) * group.index_bytes
            flops_per_s = workers * constants.flops_per_s
            decode_s = decode * max(cached_bytes / constants.memory_bytes_per_s, read * group.flops / flops_per_s)
            prefill_s = prefill * group.read(demand.isl / 2) * group.prefill_flops / flops_per_s
            total_s += group.layers * (decode_s + prefill_s)
        return total_s
