"""The engine arguments that put a model's experts on shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experts.protocol.settings import RouterSettings

WORKER_EXTENSION = "experts.vllm_plugin.worker.ExpertMeshWorker"
# Environment of a router on CPUs. OpenMP's idle threads spin for milliseconds by default, on cores that the shards may
# need. Two thousand spins take a few microseconds: enough to get from one parallel region to the next.
CPU_ROUTER_ENV = {"GOMP_SPINCOUNT": "2000"}
# What VLLM_LOGGING_CONFIG_PATH names where logs are JSON; vLLM reads it when it is imported.
JSON_LOGGING = Path(__file__).with_name("json_logging.json")
SCHEDULER = "experts.vllm_plugin.scheduler.scheduler"
EXPERTS_UNAVAILABLE = "experts_unavailable"  # the stop reason of a request that ended for want of experts
REFUSED = "expertmesh_refused"  # what a step's output has to say to the scheduler: ids of requests
TRACES = "expertmesh_traces"  # what a step that is traced has to say to the worker: W3C headers by id of request
_OWNED = ("worker_extension_cls", "load_format", "scheduler_cls")


def router_engine_kwargs(settings: RouterSettings, user: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    """vLLM engine arguments: the user's, plus what expertmesh needs. On CPUs, set `CPU_ROUTER_ENV` as well.

    Args:
        settings: the router's settings, passed on in additional_config.
        user: the user's engine arguments. ValueError for one that expertmesh sets itself.
        device: "cpu" or "cuda"; on GPUs CUDA graphs are split at the MoE layers.
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
        "scheduler_cls": SCHEDULER,
        "additional_config": {**extra, "expertmesh": settings.model_dump()},
    }
    if device == "cuda" and not user.get("enforce_eager"):
        # The plug-in makes vLLM split its graphs at the MoE ops; a full graph cannot be split.
        kwargs["compilation_config"] = {"cudagraph_mode": "PIECEWISE", **(user.get("compilation_config") or {})}
    return kwargs
