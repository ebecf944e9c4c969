"""From checked arguments to Serve applications."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.deployment import Application

from cluster.config.apps import ConsoleAppConfig, ExpertsAppConfig, LLMAppConfig
from cluster.config.deployments import CONTROLLER, SHARD
from cluster.config.gateway.sections import GATEWAY, GatewayAppConfig
from cluster.config.replicas import PREFILL_ROUTER
from cluster.console.deployment import ConsoleServer
from cluster.controller.client import ROUTER
from cluster.controller.deployment import PlacementController
from cluster.controller.pinned_model import with_pinned_model
from cluster.gateway.deployment import GatewayServer
from cluster.gateway.options import gateway_options
from cluster.keys.deployment import KEY_LEDGER, KeyLedger
from cluster.ray_joints import logs_are_json
from cluster.refusals.applications import refuse_console, refuse_experts, refuse_gateway, refuse_llm
from cluster.refusals.model_files import folder_here
from cluster.router.deployment import PrefillRouter, Router
from cluster.router.options import router_options
from cluster.router.request_routing import route_requests
from cluster.shard.deployment import ExpertShard
from experts.model.spec import ExpertSpec

# Many long polls and heartbeats are pending together; none of them costs anything.
CONTROLLER_OPTIONS: dict[str, Any] = {
    "max_ongoing_requests": 10_000,
    "health_check_period_s": 2,
    "health_check_timeout_s": 10,
    "graceful_shutdown_wait_loop_s": 0.1,
    "graceful_shutdown_timeout_s": 5,
}
SHARD_OPTIONS: dict[str, Any] = {
    "max_ongoing_requests": 100,
    "health_check_period_s": 5,
    "health_check_timeout_s": 30,
    "graceful_shutdown_wait_loop_s": 0.1,
}
LEDGER_OPTIONS: dict[str, Any] = {
    "num_replicas": 1,  # whose memory is the state; routers tell a new one what they have used
    "max_ongoing_requests": 10_000,
    "ray_actor_options": {"num_cpus": 0},
    "health_check_period_s": 2,
    "health_check_timeout_s": 10,
    "graceful_shutdown_wait_loop_s": 0.1,
}
SLOW_BYTES_PER_S, LONGEST_STOP_S = 100e6, 3600
CONSOLE_OPTIONS: dict[str, Any] = {
    "max_ongoing_requests": 1000,
    "num_replicas": 1,
    "graceful_shutdown_wait_loop_s": 0.2,
}


def quiet() -> dict[str, Any]:
    """No line for each call: shards and routers make dozens a second while experts move. JSON if Serve's log is JSON.

    A deployment's own logging_config replaces that of the Serve config whole.
    """
    return {"enable_access_log": False, **({"encoding": "JSON"} if logs_are_json() else {})}


def experts_application(config: ExpertsAppConfig) -> Application:
    """Shards and their controller. Raises ConfigError, with nothing deployed, if model, slots or options do not fit."""
    config = with_pinned_model(config)
    folder, complete = folder_here(config.model.path)
    refuse_experts(config, folder=folder, complete=complete)
    # Here, so that the other builders do without what reads checkpoints.
    from cluster.mesh.planning import read_spec

    spec = read_spec(config)
    args = config.model_dump(exclude_unset=True)
    options = {"logging_config": quiet(), **SHARD_OPTIONS, **config.shards.deployment_config}
    options.setdefault("graceful_shutdown_timeout_s", stop_timeout_s(config, spec))
    shards = serve.deployment(
        ExpertShard,
        name=SHARD,
        num_replicas=1,  # as `deployments` in the file says
        ray_actor_options=_with_env(
            config.shards.ray_actor_options, {"OMP_NUM_THREADS": str(config.shards.num_threads)}
        ),
        **options,
    ).bind(args, options["graceful_shutdown_timeout_s"])
    return serve.deployment(
        PlacementController,
        name=CONTROLLER,
        num_replicas=1,
        ray_actor_options=config.controller.ray_actor_options,
        user_config={},  # as `deployments` in the file says
        logging_config=quiet(),
        **CONTROLLER_OPTIONS,
    ).bind(args, {"num_layers": spec.num_layers, "num_experts": spec.num_experts}, shards)


def stop_timeout_s(config: ExpertsAppConfig, spec: ExpertSpec) -> float:
    """How long a shard may take to hand on what it has: its bytes at a slow network's pace, and a minute."""
    slots = config.shards.slots_per_rank or spec.num_experts
    itemsize = 4 if config.model.dtype == "float32" else 2
    shard_bytes = 3 * spec.hidden_size * spec.intermediate_size * itemsize * slots * spec.num_layers
    return float(min(60 + round(shard_bytes / SLOW_BYTES_PER_S), LONGEST_STOP_S))


def llm_application(config: LLMAppConfig) -> Application:
    """The routers, which are the application's HTTP ingress. Raises ConfigError, with nothing deployed."""
    config = with_pinned_model(config)
    folder, complete = folder_here(config.model.path)
    refuse_llm(config, folder=folder, complete=complete)
    args = config.model_dump(exclude_unset=True)
    routers, bound = config.routers, {}
    if config.http.names_keys and config.http.ledger_app is None:
        bound["ledger"] = _ledger()
    if config.pools is not None:
        prefill = router_options(config.of_pool("prefill").routers)
        bound["prefill"] = serve.deployment(PrefillRouter, name=PREFILL_ROUTER, **prefill).bind(args)
        routers = config.of_pool("decode").routers
    router = serve.deployment(Router, name=ROUTER, **router_options(routers))
    return route_requests(router.bind(args, **bound), routers)


def console_application(config: ConsoleAppConfig) -> Application:
    """Status, placement, traces and metrics over HTTP. Raises ConfigError, with nothing deployed."""
    refuse_console(config)
    options = {**CONSOLE_OPTIONS, **config.deployment_config}
    return serve.deployment(ConsoleServer, name="Console", **options).bind(config.model_dump(exclude_unset=True))


def gateway_application(config: GatewayAppConfig) -> Application:
    """One address for several models. Raises ConfigError, with nothing deployed."""
    refuse_gateway(config)
    options = gateway_options(config)
    bound = {"ledger": _ledger()} if config.http.names_keys else {}
    return serve.deployment(GatewayServer, name=GATEWAY, user_config={}, logging_config=quiet(), **options).bind(
        config.model_dump(exclude_unset=True), **bound
    )


def _ledger() -> Application:
    return serve.deployment(KeyLedger, name=KEY_LEDGER, logging_config=quiet(), **LEDGER_OPTIONS).bind()


def _with_env(options: dict[str, Any], env_vars: dict[str, str]) -> dict[str, Any]:
    """Actor options with `env_vars` in their runtime_env, except for variables the user has set."""
    runtime_env = dict(options.get("runtime_env") or {})
    runtime_env["env_vars"] = {**env_vars, **(runtime_env.get("env_vars") or {})}
    return {**options, "runtime_env": runtime_env}
