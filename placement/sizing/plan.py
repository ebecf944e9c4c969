"""The fewest GPUs that serve a demand: routers and shards, or engines with plain expert parallelism.

The load may be divided among several services (or engines) of one kind. Numbers of services and shards come from fixed
lists, and for each the fewest routers are found by bisection: more routers never slow a step. A heavier demand or more
headroom rules layouts out and none in, so it never ends with fewer GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from placement.placement import Placement
from placement.sizing.demand import Demand
from placement.sizing.errors import NoLayoutError, SizingError
from placement.sizing.expert_times import Half
from placement.sizing.gpus import Gpu
from placement.sizing.memory import MemoryUse, engine_memory, router_memory, shard_memory
from placement.sizing.model import ModelFacts
from placement.sizing.speed import Point, Roofline

CHUNKS = (8192, 4096, 2048, 1024, 512)
REPLICAS = (1, 2)
SERVICES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
# (from, step): every number up to 16, then ever coarser.
_STEPS = ((1, 1), (16, 2), (32, 4), (64, 8), (128, 16), (256, 32), (512, 64), (1024, 128))


@dataclass(frozen=True)
class Layout:
    """Routers and shards of one service on GPUs of their own, and what they reach.

    Attributes:
        services: how many such services divide the load among them.
        router_gpus: of each router.
        replicas: of each expert at least.
        slots: of a shard in each MoE layer, the spare ones among them.
        chunk: tokens of a router's step at most (max_num_batched_tokens).
        point: where the load settles on one router.
        degraded_tpot_s: the mean time between tokens with `lost_shards` shards fewer; None if none may be lost.
    """

    services: int
    routers: int
    router_gpus: int
    shards: int
    replicas: int
    slots: int
    chunk: int
    point: Point
    router: MemoryUse
    shard: MemoryUse
    degraded_tpot_s: float | None

    @property
    def gpus(self) -> int:
        """Of all services."""
        return self.services * (self.routers * self.router_gpus + self.shards)


@dataclass(frozen=True)
class Engines:
    """`count` engines with plain expert parallelism, each on `each` GPUs: attention on every one of them for its share
    of the sequences, experts divided.
    """

    count: int
    each: int
    chunk: int
    point: Point
    memory: MemoryUse

    @property
    def gpus(self) -> int:
        """Of all engines."""
        return self.count * self.each


def plan_layout(facts: ModelFacts, gpu: Gpu, demand: Demand) -> Layout:
    """The layout with the fewest GPUs. NoLayoutError says what stands in the way of any."""
    return best_layouts(facts, gpu, demand, 1)[0]


def best_layouts(facts: ModelFacts, gpu: Gpu, demand: Demand, count: int) -> list[Layout]:
    """The `count` best layouts, the fewest GPUs first; among equals, the simplest, then the fastest."""
    check_context(facts, demand)
    check_router_gpus(facts, gpu, demand)
    found: list[Layout] = []
    for services in SERVICES:
        speed = Roofline(facts, gpu, replace(demand, rate=demand.rate / services))
        for shards in shard_counts(facts, demand):
            limit = demand.max_gpus if len(found) < count else found[count - 1].gpus
            if services * (shards + demand.router_gpus) > limit:
                break
            for replicas in REPLICAS:
                last = (limit // services - shards) // demand.router_gpus
                layout = _fewest_routers(speed, shards, replicas, last)
                if layout is not None:
                    found = sorted([*found, replace(layout, services=services)], key=_goodness)
                    break
    if not found:
        raise NoLayoutError(obstacle(Roofline(facts, gpu, demand)))
    return found[:count]


def _goodness(layout: Layout) -> tuple[int, int, int, float]:
    return layout.gpus, layout.services, layout.replicas, layout.point.tpot_s


def plan_engines(facts: ModelFacts, gpu: Gpu, demand: Demand) -> Engines | None:
    """Plain expert parallelism on the fewest GPUs, None if no number up to the limit serves the demand."""
    best: Engines | None = None
    for count in SERVICES:
        speed = Roofline(facts, gpu, replace(demand, rate=demand.rate / count))
        limit = demand.max_gpus if best is None else best.gpus - 1
        for each in _counts(1, min(limit // count, facts.num_experts)):
            engines = _engines(speed, count, each)
            if engines is not None:
                best = engines
                break
    return best


def engines_on(facts: ModelFacts, gpu: Gpu, demand: Demand, gpus: int) -> Engines | None:
    """Plain expert parallelism on up to so many GPUs, divided as is fastest; None if it does not serve the demand."""
    found = []
    for each in _counts(1, min(gpus, facts.num_experts)):
        count = gpus // each
        speed = Roofline(facts, gpu, replace(demand, rate=demand.rate / count))
        engines = _engines(speed, count, each)
        if engines is not None:
            found.append(engines)
    return min(found, key=lambda engines: engines.point.tpot_s, default=None)


def largest_rate(facts: ModelFacts, gpu: Gpu, demand: Demand, layout: Layout) -> float:
    """Requests a second that a layout carries within the limits, to 1 %; at least the demand's."""
    low, high = demand.rate, 2 * demand.rate

    def serves(rate: float) -> bool:
        speed = Roofline(facts, gpu, replace(demand, rate=rate / layout.services))
        return _layout_of_routers(speed, layout.routers, layout.shards, layout.replicas) is not None

    while serves(high) and high < 1e6 * demand.rate:
        low, high = high, 2 * high
    while high > 1.01 * low:
        middle = (low + high) / 2
        low, high = (middle, high) if serves(middle) else (low, middle)
    return low


def slots_of(num_experts: int, shards: int, replicas: int, demand: Demand) -> int:
    """Slots of a shard in each layer: its experts and the spare ones, and every expert on the shards that are left."""
    held = Placement.linear(1, num_experts, shards, min_replicas=replicas).slots_per_rank
    return max(held + demand.spare_slots, math.ceil(num_experts / (shards - demand.lost_shards)))


def shard_counts(facts: ModelFacts, demand: Demand) -> Iterator[int]:
    """Numbers of shards to try: those that leave one after a loss, and at least an expert for each."""
    return _counts(demand.lost_shards + 1, min(demand.max_gpus - 1, facts.num_experts))


def check_context(facts: ModelFacts, demand: Demand) -> None:
    """SizingError if prompts and answers are longer than the model's context."""
    if facts.max_positions is not None and demand.context > facts.max_positions:
        raise SizingError(
            f"{demand.isl} tokens of prompt and {demand.osl} of answer are {demand.context}, but {facts.name} takes "
            f"{facts.max_positions}; ask for less"
        )


def check_router_gpus(facts: ModelFacts, gpu: Gpu, demand: Demand) -> None:
    """SizingError if a router's GPUs cannot be in one node, or cannot divide the model's attention."""
    gpus = demand.router_gpus
    if gpus > gpu.gpus_per_node:
        raise SizingError(
            f"router_gpus is {gpus}, expected at most {gpu.gpus_per_node}: a router is in one node, and so many "
            f"{gpu.title} are in one"
        )
    for group in facts.attention:
        if group.heads % gpus or (gpus % group.kv_heads and group.kv_heads % gpus):
            raise SizingError(
                f"router_gpus is {gpus}, which cannot divide the {group.heads} heads and {group.kv_heads} KV heads of "
                f"{facts.name}"
            )


def _counts(first: int, last: int) -> Iterator[int]:
    for start, step in _STEPS:
        end = next((other for other, _ in _STEPS if other > start), last + step)
        yield from (count for count in range(start, end, step) if first <= count <= last)


def _fewest_routers(speed: Roofline, shards: int, replicas: int, last: int) -> Layout | None:
    """With up to `last` routers."""
    if last < 1 or replicas > shards - speed.demand.lost_shards or not _shard_fits(speed, 1, shards, replicas):
        return None
    if _layout_of_routers(speed, last, shards, replicas) is None:
        return None
    low, high = 0, 1  # low does not serve, high does
    while high < last and _layout_of_routers(speed, high, shards, replicas) is None:
        low, high = high, min(2 * high, last)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _layout_of_routers(speed, middle, shards, replicas) else (middle, high)
    return _layout_of_routers(speed, high, shards, replicas) if _shard_fits(speed, high, shards, replicas) else None


def _shard_fits(speed: Roofline, routers: int, shards: int, replicas: int) -> bool:
    slots = slots_of(speed.facts.num_experts, shards, replicas, speed.demand)
    memory = shard_memory(speed.facts, slots=slots, pairs=routers * speed.demand.router_gpus)
    return _fits(memory, speed.gpu, speed.demand)


def _layout_of_routers(speed: Roofline, routers: int, shards: int, replicas: int) -> Layout | None:
    """The layout if its routers fit and the limits are kept; whether its shards fit is asked apart."""
    facts, gpu, demand = speed.facts, speed.gpu, speed.demand
    workers = demand.router_gpus
    half = Half(shards, routers, routers * workers + shards, replicas, workers=workers)
    left = replace(half, shards=shards - demand.lost_shards)
    if not speed.keeps_up(left):
        return None
    for chunk, point in _chunks(speed, half):
        memory = router_memory(
            facts, demand.kv_value_bytes, chunk=chunk, sequences=point.peak_sequences, context=demand.context,
            shards=shards, workers=workers,
        )  # fmt: skip
        if _fits(memory, gpu, demand):
            slots = slots_of(facts.num_experts, shards, replicas, demand)
            shard = shard_memory(facts, slots=slots, pairs=routers * workers)
            degraded = speed.settled_step(left).total_s if demand.lost_shards else None
            return Layout(1, routers, workers, shards, replicas, slots, chunk, point, memory, shard, degraded)
    return None


def _engines(speed: Roofline, count: int, each: int) -> Engines | None:
    """`speed` is that of one engine's share of the load."""
    facts, demand = speed.facts, speed.demand
    for chunk, point in _chunks(speed, Half(each, each, each, lockstep=True)):
        memory = engine_memory(
            facts, demand.kv_value_bytes, gpus=each, chunk=chunk, sequences=point.peak_sequences,
            context=demand.context,
        )  # fmt: skip
        if _fits(memory, speed.gpu, demand):
            return Engines(count, each, chunk, point, memory)
    return None


def _chunks(speed: Roofline, half: Half) -> Iterator[tuple[int, Point]]:
    """(tokens of a step at most, where it settles): the largest that no token waits too long for, then the others."""
    limit_s = speed.demand.tpot_ms / 1e3
    found = [(chunk, point) for chunk in CHUNKS if (point := speed.settle(chunk, half)) is not None]
    yield from (each for each in found if each[1].longest_step_s <= limit_s)
    yield from (each for each in reversed(found) if each[1].longest_step_s > limit_s)


def _fits(memory: MemoryUse, gpu: Gpu, demand: Demand) -> bool:
    return memory.free_share(gpu) >= demand.headroom


def obstacle(speed: Roofline) -> str:
    """Why nothing fits, by asking again with one limit lifted after the other."""
    facts, gpu, demand = speed.facts, speed.gpu, speed.demand
    what = f"{facts.name} on up to {demand.max_gpus} x {gpu.title}"
    counts = list(shard_counts(facts, demand))
    if not counts:
        return f"{what}: {demand.lost_shards} lost shards leave none; allow more GPUs or fewer losses"
    largest = counts[-1]
    workers = demand.router_gpus
    shard = shard_memory(facts, slots=slots_of(facts.num_experts, largest, 1, demand), pairs=workers)
    if not _fits(shard, gpu, demand):
        return (
            f"{what}: each of {largest} shards needs {shard.nbytes / 1e9:.1f} GB of {gpu.memory_bytes / 1e9:.1f} with "
            f"{demand.headroom:.0%} kept free; take larger GPUs, allow more of them, or leave less headroom"
        )
    router = router_memory(
        facts, demand.kv_value_bytes, chunk=CHUNKS[-1], sequences=1, context=demand.context, shards=counts[0],
        workers=workers,
    )  # fmt: skip
    if not _fits(router, gpu, demand):
        return (
            f"{what}: each GPU of a router needs {router.nbytes / 1e9:.1f} GB for one sequence of "
            f"{gpu.memory_bytes / 1e9:.1f} with {demand.headroom:.0%} kept free, and a router is {workers} GPU(s); "
            "take larger ones, more for each router (--router-gpus), or leave less headroom"
        )
    halves = (Half(shards, 1, shards + workers, workers=workers) for shards in counts)
    idle_s = min(speed.mean_step(0.0, half).total_s for half in halves)
    if idle_s * 1e3 > demand.tpot_ms:
        return (
            f"{what}: a step of one sequence takes {idle_s * 1e3:.1f} ms at best, more than --tpot-ms "
            f"{demand.tpot_ms:g}; allow more time"
        )
    return f"{what} do not carry {demand.rate:g} requests/s within the limits; allow more GPUs or more time"
