"""The answer as JSON: every figure with its unit and where it comes from.

headers    sums of the files' headers
config     arithmetic on config.json by the architecture's rules
nominal    data sheets
measured   by this project's benchmarks
estimated  rooflines, assumed costs and constants
given      the question
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from cluster.sizing_command.models import figure, model_as_json
from placement.sizing.memory import MemoryUse
from placement.sizing.plan import Engines, Layout
from placement.sizing.sizing import Sizing, shares


def as_json(sizing: Sizing) -> dict[str, Any]:
    """The whole answer as plain JSON values."""
    best, verdict = sizing.layout, sizing.verdict
    return {
        "question": {
            "model": sizing.facts.name,
            "gpu": sizing.gpu.name,
            "price_per_gpu_hour": sizing.price_per_gpu_hour,
            **asdict(sizing.demand),
        },
        "model": model_as_json(sizing.facts, sizing.demand.kv_value_bytes),
        "gpu": {
            "title": sizing.gpu.title,
            "memory": figure(sizing.gpu.memory_bytes, "bytes", "nominal"),
            "memory_rate": figure(sizing.gpu.constants.memory_bytes_per_s, "bytes/s", "estimated"),
            "compute_rate": figure(sizing.gpu.constants.flops_per_s, "flop/s", "estimated"),
            "notes": sizing.gpu.notes,
        },
        "layout": _layout(sizing, best)
        | {
            "carries": figure(sizing.carries, "requests/s", "estimated"),
            "router_memory": _memory(best.router, sizing),
            "shard_memory": _memory(best.shard, sizing),
            "step_shares": {
                name: figure(share, "of a step", "estimated") for name, share in shares(best.point.step).items()
            },
        },
        "alternatives": [_layout(sizing, layout) for layout in sizing.layouts[1:]],
        "plain_expert_parallelism": {
            "fewest_gpus": _engines(sizing, sizing.engines),
            "equal_gpus": _engines(sizing, sizing.engines_equal),
        },
        "verdict": {"pays": verdict.pays, "why": list(verdict.why), "basis": "estimated"},
    }


def _layout(sizing: Sizing, layout: Layout) -> dict[str, Any]:
    point = layout.point
    degraded = None if layout.degraded_tpot_s is None else 1e3 * layout.degraded_tpot_s
    return {
        "gpus": figure(layout.gpus, "GPUs", "estimated"),
        "services": layout.services,
        "routers": layout.routers,
        "router_gpus": layout.router_gpus,
        "shards": layout.shards,
        "slots_per_shard": layout.slots,
        "replicas": layout.replicas,
        "max_num_batched_tokens": layout.chunk,
        "max_num_seqs": point.peak_sequences,
        "tpot": figure(1e3 * point.tpot_s, "ms", "estimated"),
        "ttft": figure(1e3 * point.ttft_s, "ms", "estimated"),
        "longest_step": figure(1e3 * point.longest_step_s, "ms", "estimated"),
        "tpot_after_a_loss": figure(degraded, "ms", "estimated"),
        "sequences_of_a_router": figure(point.sequences, "", "estimated"),
        "answered": figure(sizing.answered_per_s, "tokens/s", "given"),
        **_price(sizing, layout.gpus),
    }


def _engines(sizing: Sizing, engines: Engines | None) -> dict[str, Any] | None:
    if engines is None:
        return None
    return {
        "gpus": figure(engines.gpus, "GPUs", "estimated"),
        "engines": engines.count,
        "gpus_of_an_engine": engines.each,
        "tpot": figure(1e3 * engines.point.tpot_s, "ms", "estimated"),
        "ttft": figure(1e3 * engines.point.ttft_s, "ms", "estimated"),
        "memory": _memory(engines.memory, sizing),
        **_price(sizing, engines.gpus),
    }


def _price(sizing: Sizing, gpus: int) -> dict[str, Any]:
    if sizing.price_per_gpu_hour is None:
        return {}
    return {
        "price_per_hour": figure(sizing.price_per_hour(gpus), "", "estimated"),
        "price_per_million_answered": figure(sizing.price_per_million(gpus), "", "estimated"),
    }


def _memory(memory: MemoryUse, sizing: Sizing) -> dict[str, Any]:
    return {
        "lines": [
            {"what": line.what, "how": line.how, **figure(line.nbytes, "bytes", line.basis)} for line in memory.lines
        ],
        "total": figure(memory.nbytes, "bytes", "estimated"),
        "free": figure(memory.free_share(sizing.gpu), "of the GPU", "estimated"),
    }
