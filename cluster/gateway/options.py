"""Serve options of the gateway deployment."""

from __future__ import annotations

from typing import Any

from cluster.config.gateway.sections import GatewayAppConfig
from cluster.serve_environment import ROUTER_ENVIRONMENT

DEFAULTS: dict[str, Any] = {
    "max_ongoing_requests": 1_000_000_000,  # http.max_requests answers in OpenAI's format
    "num_replicas": 1,
    "health_check_period_s": 2,
    "health_check_timeout_s": 10,
    "graceful_shutdown_wait_loop_s": 0.2,
    # As routers: what has begun goes on, and a new one serves before an old one stops.
    "graceful_shutdown_timeout_s": 600,
    "max_surge_percent": 100,
}


def gateway_options(config: GatewayAppConfig) -> dict[str, Any]:
    """Replicas and their actors. One event loop serves and passes on, as in routers."""
    options = {**DEFAULTS, **config.deployment_config}
    if options.get("autoscaling_config") is not None:
        options.pop("num_replicas")
    actor = dict(options.get("ray_actor_options") or {})
    runtime_env = dict(actor.get("runtime_env") or {})
    runtime_env["env_vars"] = {**ROUTER_ENVIRONMENT, **(runtime_env.get("env_vars") or {})}
    return {**options, "ray_actor_options": {**actor, "runtime_env": runtime_env}}
