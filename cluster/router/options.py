"""Serve options of the router deployment, as Ray Serve LLM's builder would compute them, without importing it.

`tests/cluster/router/test_options.py` compares them with that builder's own for every config that ships.
"""

from __future__ import annotations

import copy
from typing import Any

from cluster.config.llm_sections import RoutersSection
from cluster.router.request_routing import request_router_config
from cluster.serve_environment import ROUTER_ENVIRONMENT
from experts.vllm_plugin.engine_kwargs import CPU_ROUTER_ENV

SETUP_HOOK = "ray.llm._internal.serve._worker_process_setup_hook"
DEFAULTS: dict[str, Any] = {
    "max_ongoing_requests": 1_000_000_000,
    "health_check_period_s": 10,
    "health_check_timeout_s": 10,
    "graceful_shutdown_wait_loop_s": 0.2,
    # An old router goes on with the answers that it has begun; after that Serve cuts them off.
    "graceful_shutdown_timeout_s": 600,
    # In an upgrade every new router serves before an old one stops, and one that never comes up replaces none.
    "max_surge_percent": 100,
}


def runtime_env_of(routers: RoutersSection) -> dict[str, Any]:
    """Environment of routers and their engines."""
    own = CPU_ROUTER_ENV if routers.accelerator == "cpu" else {}
    traced = {} if routers.tracing is None else routers.tracing.environment()
    return {"env_vars": {**ROUTER_ENVIRONMENT, **own, **traced, **routers.env_vars}}


def router_options(routers: RoutersSection) -> dict[str, Any]:
    """Number of replicas, actor options, and the placement group of one engine and its workers."""
    options = {**DEFAULTS, **copy.deepcopy(routers.deployment_config)}
    if options.get("autoscaling_config") is None:
        options.setdefault("num_replicas", routers.count or 1)
    if (router_config := request_router_config(routers)) is not None:
        options["request_router_config"] = copy.deepcopy(router_config)
    actor = dict(options.get("ray_actor_options") or {})
    group = routers.placement_group_config or {}
    options["placement_group_bundles"] = _with_replica(_engine_bundles(routers, group), actor)
    # Workers of an engine tell each other through shared memory which rows lack an expert, so they share a host.
    options["placement_group_strategy"] = group.get("strategy", "PACK" if routers.workers == 1 else "STRICT_PACK")
    user_env = dict(actor.get("runtime_env") or {})
    actor["runtime_env"] = {"worker_process_setup_hook": SETUP_HOOK, **user_env, **runtime_env_of(routers)}
    options["ray_actor_options"] = actor
    return options


def _engine_bundles(routers: RoutersSection, group: dict[str, Any]) -> list[dict[str, float]]:
    """Resources of each of the engine's workers, or what the user lists."""
    if "bundles" in group:
        bundles = [dict(bundle) for bundle in group["bundles"]]
    else:
        each = group.get("bundle_per_worker", {"GPU": 1} if routers.accelerator == "gpu" else {"CPU": 1})
        bundles = [dict(each) for _ in range(routers.workers)]
    if routers.accelerator_type is not None:
        for bundle in bundles:
            bundle.setdefault(f"accelerator_type:{routers.accelerator_type}", 0.001)
    return bundles


def _with_replica(bundles: list[dict[str, float]], actor: dict[str, Any]) -> list[dict[str, float]]:
    """`bundles` with the replica's own resources added to the first one, where it runs."""
    own = {"CPU": actor.get("num_cpus", 1), "GPU": actor.get("num_gpus", 0), **(actor.get("resources") or {})}
    if "memory" in actor:
        own["memory"] = actor["memory"]
    first = {key: bundles[0].get(key, 0) + own.get(key, 0) for key in {*bundles[0], *own}}
    return [first, *bundles[1:]]
