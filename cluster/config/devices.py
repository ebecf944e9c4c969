"""What devices of routers, shards and the transport between them cannot work together, told from the config."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cluster.config.experts_sections import ShardsSection
from cluster.config.llm_sections import RoutersSection, TransportSection

BETWEEN_GPUS = ("nccl", "cuda_ipc")


def gpus_of_engine(routers: RoutersSection) -> float:
    """GPUs of a router's engine; less than 1 is a part of one."""
    group = routers.placement_group_config or {}
    bundles = group.get("bundles")
    found = [group.get("bundle_per_worker"), *(bundles if isinstance(bundles, list) else [])]
    asked = [_number(bundle.get("GPU")) for bundle in found if isinstance(bundle, dict)]
    return sum(asked) if asked else float(routers.accelerator == "gpu")


def router_device_problems(routers: RoutersSection, transport: TransportSection) -> Iterator[str]:
    """One line for each reason why the routers' devices cannot do what is asked of them, starting with the section."""
    if transport.name in BETWEEN_GPUS and routers.accelerator != "gpu":
        yield (
            f"transport.name is {transport.name}, which joins GPUs, but routers.accelerator is "
            f"{routers.accelerator!r}: use auto"
        )
    gpus = gpus_of_engine(routers)
    if routers.accelerator == "gpu" and 0 < gpus < 1 and not routers.engine_kwargs.get("kv_cache_memory_bytes"):
        yield (
            f"routers.engine_kwargs.kv_cache_memory_bytes is not set, but an engine has {gpus:g} of a GPU: vLLM would "
            "measure what is left while the GPU's other processes load; say how many bytes its KV cache gets"
        )


def device_disagreements(
    shards: ShardsSection, routers: RoutersSection, transport: TransportSection, most_shards: int
) -> Iterator[str]:
    """One line for each reason why rows cannot travel between these routers and, at most, so many shards."""
    sizes_itself = routers.accelerator == "gpu" and not routers.engine_kwargs.get("kv_cache_memory_bytes")
    if sizes_itself and transport.name in ("auto", "nccl") and most_shards > transport.reserve_for_shards:
        yield (
            f"transport.reserve_for_shards is {transport.reserve_for_shards}, but there may be {most_shards} shards: "
            "vLLM would give memory that pairs need to its KV cache"
        )
    if transport.name in BETWEEN_GPUS and shards.device != "cuda":
        yield f"transport.name is {transport.name}, but shards.device is {shards.device!r}, expected cuda"
    part, rest = gpus_of_engine(routers), _number(shards.ray_actor_options.get("num_gpus"))
    if transport.name == "nccl" and shards.device == "cuda" and part > 0 and rest > 0 and part + rest <= 1:
        yield (
            f"transport.name is nccl, but a router ({part:g} of a GPU) and a shard ({rest:g}) fit one GPU, and NCCL "
            "refuses two ranks on one GPU: use auto or cuda_ipc, or give each a whole GPU"
        )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
