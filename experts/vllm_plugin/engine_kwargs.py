"""What an engine has to be started with, so that its experts live on shards."""

from __future__ import annotations

from typing import Any

from experts.protocol.settings import RouterSettings

WORKER_EXTENSION = "experts.vllm_plugin.worker.ExpertMeshWorker"
# What a router on CPUs has in its environment. OpenMP's idle threads spin, by default for milliseconds; the shards
# that the router waits for may need those cores. Two thousand rounds are some microseconds: enough to go from one
# parallel region to the next.
CPU_ROUTER_ENV = {"GOMP_SPINCOUNT": "2000"}
_OWNED = ("worker_extension_cls", "load_format")


def router_engine_kwargs(settings: RouterSettings, user: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    """vLLM engine arguments: the user's, plus what expertmesh needs. On CPUs, see `CPU_ROUTER_ENV` too.

    Args:
        settings: the router's settings, which travel in additional_config.
        user: the user's engine arguments. ValueError for one that the project has to own.
        device: "cpu" or "cuda"; on GPUs CUDA graphs are made to split at the MoE layers.
    """
    for key in _OWNED:
        if key in user:
            raise ValueError(f"engine_kwargs.{key} is set by expertmesh, remove it (it is {user[key]!r})")
    extra = dict(user.get("additional_config") or {})
    if "expertmesh" in extra:
        raise ValueError("engine_kwargs.additional_config.expertmesh is set by expertmesh, remove it")
    kwargs = {
        **user,
        "worker_extension_cls": WORKER_EXTENSION,
        "load_format": "expertmesh",
        "additional_config": {**extra, "expertmesh": settings.model_dump()},
    }
    if device == "cuda" and not user.get("enforce_eager"):
        # The plug-in adds the MoE ops to the places where vLLM splits its graphs; a full graph has no such places.
        kwargs["compilation_config"] = {"cudagraph_mode": "PIECEWISE", **(user.get("compilation_config") or {})}
    return kwargs
