"""What devices of routers, shards and the transport between them cannot work together, told from the config."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cluster.config.experts_sections import ShardsSection
from cluster.config.llm_sections import RoutersSection, TransportSection

BETWEEN_GPUS = ("nccl", "cuda_ipc")


def gpus_of_engine(routers: RoutersSection) -> float:
    """GPUs of a router's engine; less than 1 is a part of one."""
    asked = _gpus_of_bundles(routers)
    return sum(asked) if asked else float(routers.workers * (routers.accelerator == "gpu"))


def _gpus_of_bundles(routers: RoutersSection) -> list[float]:
    """GPUs of each bundle that the user asks for; empty if there are none."""
    group = routers.placement_group_config or {}
    each, bundles = group.get("bundle_per_worker"), group.get("bundles")
    found = [*[each] * routers.workers, *(bundles if isinstance(bundles, list) else [])]
    return [_number(bundle.get("GPU")) for bundle in found if isinstance(bundle, dict)]


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
    if routers.workers > 1:
        yield from _problems_of_workers(routers)


def _problems_of_workers(routers: RoutersSection) -> Iterator[str]:
    """What does not go with several workers of an engine."""
    where = "routers.placement_group_config"
    whose = f"the {routers.workers} workers of an engine (tensor_parallel_size)"
    strategy = (routers.placement_group_config or {}).get("strategy", "STRICT_PACK")
    if strategy in ("PACK", "SPREAD", "STRICT_SPREAD"):
        yield f"{where}.strategy is {strategy}, but {whose} share a host: remove it, the default is STRICT_PACK then"
    with_gpus = [gpus for gpus in _gpus_of_bundles(routers) if gpus]
    if routers.accelerator == "gpu" and with_gpus and with_gpus != [1] * routers.workers:
        told = ", ".join(f"{gpus:g}" for gpus in with_gpus)
        yield (
            f"{where} has bundles with {told} GPU(s), but {whose} take a whole one each: expected "
            "bundle_per_worker with GPU: 1, or as many bundles with GPU: 1"
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
