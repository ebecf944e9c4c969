"""Series of a shard: what it holds, computes and copies. It tells Ray's metrics agent itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cluster.observability.series import Samples, Series
from experts.protocol.status import OffloadStatus, ShardStatus

SOURCES = ("process", "shm", "tcp", "checkpoint")  # series of these are there from the start


@dataclass(frozen=True)
class ShardFacts:
    """A shard's status, and the memory of its process."""

    status: ShardStatus
    resident_bytes: int
    device_bytes: int | None  # on a GPU; None without one


def _total(name: str, value: Callable[[ShardStatus], float], description: str) -> Series[ShardFacts]:
    return Series(name, "counter", description, lambda f: {(str(f.status.rank),): value(f.status)}, ("rank",))


def _value(name: str, value: Callable[[ShardFacts], float | None], description: str) -> Series[ShardFacts]:
    def samples(facts: ShardFacts) -> Samples:
        now = value(facts)
        return {} if now is None else {(str(facts.status.rank),): float(now)}

    return Series(name, "gauge", description, samples, ("rank",))


def _by_source(name: str, values: Callable[[ShardStatus], dict[str, int]], description: str) -> Series[ShardFacts]:
    def samples(facts: ShardFacts) -> Samples:
        found, rank = values(facts.status), str(facts.status.rank)
        return {(rank, source): found.get(source, 0) for source in dict.fromkeys((*SOURCES, *found))}

    return Series(name, "counter", description, samples, ("rank", "source"))


def _offload(
    name: str, kind: Literal["counter", "gauge"], value: Callable[[OffloadStatus], float], description: str
) -> Series[ShardFacts]:
    def samples(facts: ShardFacts) -> Samples:
        told = facts.status.offload
        return {} if told is None else {(str(facts.status.rank),): float(value(told))}

    return Series(name, kind, f"{description}; only with shards.offload", samples, ("rank",))


SHARD_SERIES: tuple[Series[ShardFacts], ...] = (
    _total("shard_requests", lambda s: s.requests, "Dispatches that the shard answered"),
    _total("shard_rows", lambda s: s.rows, "Token rows that the shard computed"),
    _total("shard_pairs", lambda s: s.pairs, "Row-expert pairs that the shard computed"),
    _total("shard_errors", lambda s: s.errors, "Dispatches that the shard could not answer"),
    _total(
        "shard_compute_seconds",
        lambda s: s.compute_ns / 1e9,
        "Time from a batch of requests to its sums: the rate is the share of time in which the kernel has work",
    ),
    _value("shard_resident_bytes", lambda f: f.resident_bytes, "Anonymous memory of the shard's process"),
    _value("shard_device_bytes", lambda f: f.device_bytes, "Memory of the GPU that the shard's process has reserved"),
    _value("shard_loaded_bytes", lambda f: f.status.loaded_bytes, "Bytes of expert weights on the shard"),
    _value("shard_experts", lambda f: f.status.loaded_experts, "Experts in the shard's slots, over all layers"),
    _value("shard_slots", lambda f: f.status.num_slots, "Slots of a layer"),
    _value("shard_slots_free", lambda f: f.status.free_slots, "Slots without an expert, over all layers"),
    _value("shard_routers", lambda f: len(f.status.routers), "Routers connected to the shard"),
    _value("shard_copies_in_flight", lambda f: f.status.copies_in_flight, "Copies into the shard that run now"),
    _by_source("shard_copies", lambda s: s.copies, "Copies into the shard by source"),
    _by_source("shard_copied_bytes", lambda s: s.copied_bytes, "Bytes of copies into the shard by source"),
    _total("shard_failed_copies", lambda s: s.copies_failed, "Copies into the shard that failed"),
    _total("shard_copy_seconds", lambda s: s.copy_seconds, "Time in which copies into the shard ran"),
    _total("shard_handed_out", lambda s: s.handed_out, "Experts that other shards copied from this one"),
    _total("shard_handed_out_bytes", lambda s: s.handed_out_bytes, "Bytes of those experts"),
    _offload(
        "shard_offload_resident_bytes", "gauge", lambda o: o.resident_bytes, "Bytes of experts in the kernel's memory"
    ),
    _offload("shard_offload_hits", "counter", lambda o: o.hits, "Experts of dispatches that were resident"),
    _offload("shard_offload_misses", "counter", lambda o: o.misses, "Experts of dispatches that had to be waited for"),
    _offload(
        "shard_offload_copied_bytes", "counter", lambda o: o.copied_bytes, "Bytes copied into the kernel's memory"
    ),
    _offload(
        "shard_offload_copy_seconds", "counter", lambda o: o.copy_seconds, "Time of those copies, added up over threads"
    ),
    _offload(
        "shard_offload_wait_seconds", "counter", lambda o: o.wait_seconds, "Time in which dispatches waited for experts"
    ),
    _offload(
        "shard_offload_prefetched", "counter", lambda o: o.prefetched, "Experts copied before a dispatch needed them"
    ),
    _offload(
        "shard_offload_prefetches_wasted", "counter", lambda o: o.prefetches_wasted, "Of those, evicted without a use"
    ),
)
