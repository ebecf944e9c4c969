"""Shards whose device does not hold their experts: how many are in memory, how often, and what that costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from placement.capacity.hardware import ModelShape
from placement.capacity.residency import FORESEEN, Offload
from placement.capacity.step_cost import step_cost
from placement.placement import Placement
from placement.sizing.demand import Demand
from placement.sizing.errors import NoLayoutError, SizingError
from placement.sizing.expert_times import Half, made_up_trace
from placement.sizing.gpus import Gpu
from placement.sizing.memory import DTYPE_BYTES, shard_memory
from placement.sizing.model import ModelFacts
from placement.sizing.speed import Roofline
from placement.topology import Topology
from placement.traces.trace import ActivationTrace

STREAMS = (1, 4, 16, 64)
_CALLS = 256  # tokens of the trace that are played through for one figure, at least four steps


@dataclass(frozen=True)
class OffloadQuestion:
    """`shards` shards of one model on the GPU.

    Attributes:
        shards: how many divide the experts; each has one replica of its own.
        device_bytes: memory of a shard's device, by default the GPU's.
        copy_bytes_per_s: from host memory to the device.
        trace: routing to play through; None for a made-up one of the demand's skew.
        layers_share: whether layers share a shard's memory, as on CPUs.
    """

    shards: int
    copy_bytes_per_s: float
    device_bytes: float | None = None
    trace: ActivationTrace | None = None
    layers_share: bool = False

    def __post_init__(self) -> None:
        if self.shards < 1:
            raise SizingError(f"shards is {self.shards}, expected at least 1")
        for name in ("copy_bytes_per_s", "device_bytes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise SizingError(f"{name} is {value}, expected more than 0")


@dataclass(frozen=True)
class OffloadSpeed:
    """Steps of one router with so many streams. Factors: tokens/s, relative to shards with all experts in memory."""

    streams: int
    hit_rate: float
    factor: float
    factor_with_prefetch: float


@dataclass(frozen=True)
class OffloadSizing:
    """What a shard has in memory, by layer and in all, and what that costs.

    Attributes:
        slots: of a shard in each layer.
        resident: of these, in the device's memory at a time.
        resident_bytes, all_bytes: of experts, in the device's memory and in all slots, which host memory holds.
        room_bytes: of the device's memory, what is left for experts.
    """

    facts: ModelFacts
    gpu: Gpu
    question: OffloadQuestion
    slots: int
    resident: int
    resident_bytes: float
    all_bytes: float
    room_bytes: float
    speeds: tuple[OffloadSpeed, ...]

    @property
    def resident_fraction(self) -> float:
        """For `shards.offload`: rounded down, so that it means `resident` slots."""
        return _fraction(self.resident, self.slots)


def size_offload(facts: ModelFacts, gpu: Gpu, demand: Demand, question: OffloadQuestion) -> OffloadSizing:
    """Answer a question. SizingError for one that makes no sense, NoLayoutError if no expert of each layer fits."""
    if question.shards > facts.num_experts:
        raise SizingError(f"shards is {question.shards}, expected at most the {facts.num_experts} experts of a layer")
    slots = math.ceil(facts.num_experts / question.shards) + demand.spare_slots
    layer_bytes = facts.expert_layers * facts.expert_bytes
    others = shard_memory(facts, slots=0, pairs=demand.router_gpus).nbytes
    device = question.device_bytes or gpu.memory_bytes
    room = (1 - demand.headroom) * device - others
    resident = min(math.floor(room / layer_bytes), slots)
    if resident < 1:
        raise NoLayoutError(
            f"{facts.name}: an expert of each layer takes {layer_bytes / 1e9:.2f} GB, and of {device / 1e9:.2f} GB "
            f"with {demand.headroom:.0%} kept free {max(room, 0) / 1e9:.2f} are left; take more memory or less headroom"
        )
    speeds = tuple(_speed(facts, gpu, demand, question, slots, resident, streams) for streams in STREAMS)
    return OffloadSizing(
        facts, gpu, question, slots, resident, resident * layer_bytes, slots * layer_bytes, room, speeds
    )


def _fraction(resident: int, slots: int) -> float:
    return math.floor(1e4 * resident / slots) / 1e4


def _speed(
    facts: ModelFacts, gpu: Gpu, demand: Demand, question: OffloadQuestion, slots: int, resident: int, streams: int
) -> OffloadSpeed:
    trace = question.trace
    if trace is None:
        trace = made_up_trace(facts.num_experts, facts.top_k, demand.skew)
    if trace.num_experts != facts.num_experts:
        raise SizingError(
            f"the trace is of {trace.num_experts} experts in a layer, {facts.name} has {facts.num_experts}"
        )
    half = Half(question.shards, 1, demand.router_gpus + question.shards, workers=demand.router_gpus)
    step = Roofline(facts, gpu, demand).step(streams, 0, streams, half)
    think_s = (step.total_s - step.moe_layers * step.experts.total_s) / step.moe_layers
    D, I = facts.hidden_size, facts.expert_width
    waits_s, hit_rate = [], 1.0
    for foreseen in (0.0, FORESEEN):
        cost = step_cost(
            trace,
            Placement.linear(trace.num_layers, facts.num_experts, question.shards),
            model=ModelShape(D, I, facts.expert_bytes / (3 * D * I), DTYPE_BYTES),
            constants=gpu.constants,
            topology=Topology.uniform(question.shards, links=gpu.links),
            tokens=streams,
            router_nodes=[0],
            think_s=think_s,
            batches=max(_CALLS // streams, 4),
            offload=Offload(
                _fraction(resident, slots), question.copy_bytes_per_s, slots, foreseen, question.layers_share
            ),
        )
        waits_s.append(step.moe_layers * float(cost.copy_s.mean()))
        hit_rate = cost.hit_rate
    factors = (step.total_s / (step.total_s + wait_s) for wait_s in waits_s)
    return OffloadSpeed(streams, hit_rate, *factors)
