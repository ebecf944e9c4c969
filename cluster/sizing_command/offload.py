"""What `expertmesh size --offload` answers, as JSON and for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cluster.sizing_command.models import figure
from placement.capacity.residency import FORESEEN
from placement.sizing.offload import OffloadSizing


def as_json(sizing: OffloadSizing) -> dict[str, Any]:
    """The whole answer as plain JSON values."""
    question = sizing.question
    return {
        "model": sizing.facts.name,
        "gpu": sizing.gpu.name,
        "shards": question.shards,
        "layers_share": question.layers_share,
        "copy_rate": figure(question.copy_bytes_per_s, "bytes/s", "given"),
        "routing": "made up" if question.trace is None else question.trace.source,
        "slots_per_shard": sizing.slots,
        "resident_slots": sizing.resident,
        "resident_fraction": sizing.resident_fraction,
        "room": figure(sizing.room_bytes, "bytes", "estimated"),
        "resident": figure(sizing.resident_bytes, "bytes", sizing.facts.basis),
        "host_memory": figure(sizing.all_bytes, "bytes", sizing.facts.basis),
        "speeds": [
            {
                "streams": speed.streams,
                "hit_rate": figure(speed.hit_rate, "of experts asked for", "estimated"),
                "tokens_per_s": figure(speed.factor, "of all resident", "estimated"),
                "tokens_per_s_with_prefetch": figure(speed.factor_with_prefetch, "of all resident", "estimated"),
            }
            for speed in sizing.speeds
        ],
    }


def lines_of(sizing: OffloadSizing) -> Iterator[str]:
    """The whole answer, line by line."""
    facts, question = sizing.facts, sizing.question
    yield (
        f"{facts.name}: {facts.expert_layers} layers of {facts.num_experts} experts of "
        f"{facts.expert_bytes / 1e6:.1f} MB [{facts.basis}] on {question.shards} shard(s), "
        f"{sizing.slots} slots a layer and shard"
    )
    yield (
        f"  {sizing.resident} of {sizing.slots} slots a layer are in a shard's memory: "
        f"{sizing.resident_bytes / 1e9:.2f} GB of the {sizing.room_bytes / 1e9:.2f} GB left for them  [estimated]"
    )
    yield f"  {sizing.all_bytes / 1e9:.2f} GB of host memory, or on CPUs of disk, for all of a shard's slots"
    if sizing.resident == sizing.slots:
        yield "  all experts fit: shards.offload is of no use"
        return
    yield f"  shards: {{offload: {{resident_fraction: {sizing.resident_fraction:g}}}}}"
    yield ""
    yield "  streams  experts found in memory  tokens/s of all resident  with prefetch  [estimated]"
    for speed in sizing.speeds:
        yield (f"  {speed.streams:7d}{speed.hit_rate:25.2f}{speed.factor:26.2f}{speed.factor_with_prefetch:15.2f}")
    yield ""
    routing = "made up, without a stream's likeness to itself" if question.trace is None else question.trace.source
    share = "layers share a shard's memory (CPUs)" if question.layers_share else "each layer has its own (GPUs)"
    yield f"routing: {routing}. {share}. copies: {question.copy_bytes_per_s / 1e9:g} GB/s  [given]"
    yield f"prefetch: {FORESEEN:.0%} of what is missing is foreseen, and hidden while a router thinks (docs/sizing.md)."
