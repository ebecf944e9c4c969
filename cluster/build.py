"""From a checked config to Serve applications."""

from __future__ import annotations

import copy
from typing import Any

from ray import serve
from ray.serve.deployment import Application

from cluster.client import CONTROLLER, SHARD
from cluster.config import ExpertsAppConfig, LLMAppConfig
from cluster.controller import PlacementController
from cluster.expert_shard import ExpertShard
from cluster.planning import plan_placement

# Many long polls and beats run at once, none of them costs anything.
CONTROLLER_OPTIONS = {
    "max_ongoing_requests": 10_000,
    "health_check_period_s": 2,
    "health_check_timeout_s": 10,
    "graceful_shutdown_wait_loop_s": 0.1,
    "graceful_shutdown_timeout_s": 5,
}
SHARD_OPTIONS = {
    "max_ongoing_requests": 100,
    "health_check_period_s": 5,
    "health_check_timeout_s": 30,
    "graceful_shutdown_wait_loop_s": 0.1,
}
INGRESS_OPTIONS: dict[str, Any] = {"max_ongoing_requests": 1_000_000, "num_replicas": 1}


def experts_application(config: ExpertsAppConfig) -> Application:
    """Shards and their controller. Raises ConfigError before anything is deployed if the model or slots do not fit."""
    plan_placement(config)
    args = config.model_dump(exclude_unset=True)
    shards = serve.deployment(
        ExpertShard,
        name=SHARD,
        num_replicas=config.shards.count,
        ray_actor_options=_with_env(
            config.shards.ray_actor_options, {"OMP_NUM_THREADS": str(config.shards.num_threads)}
        ),
        **{**SHARD_OPTIONS, **config.shards.deployment_config},
    ).bind(args)
    return serve.deployment(
        PlacementController,
        name=CONTROLLER,
        num_replicas=1,
        ray_actor_options=config.membership.ray_actor_options,
        **CONTROLLER_OPTIONS,
    ).bind(args, shards)


def llm_application(config: LLMAppConfig) -> Application:
    """Routers and the OpenAI ingress. Imports ray.serve.llm and so vllm, which takes seconds."""
    from ray.serve.llm import LLMConfig, build_llm_deployment

    from cluster.ingress import ingress_class
    from cluster.ray_joints import model_card, no_download_callback
    from cluster.router import ExpertMeshLLMServer

    routers = config.routers
    deployment_config = copy.deepcopy(routers.deployment_config)
    if "autoscaling_config" not in deployment_config:
        deployment_config.setdefault("num_replicas", routers.count or 1)
    fields: dict[str, Any] = {
        "callback_config": {"callback_class": no_download_callback()},
        **routers.llm_config,
        "model_loading_config": {"model_id": config.model.id, "model_source": config.model.path},
        "engine_kwargs": config.engine_kwargs(),
        "deployment_config": deployment_config,
        "accelerator_config": {"kind": routers.accelerator},
        "runtime_env": {"env_vars": {"HF_HUB_OFFLINE": "1", **routers.env_vars}},
        "server_cls": ExpertMeshLLMServer,
    }
    if routers.accelerator_type is not None:
        fields["accelerator_type"] = routers.accelerator_type
    if routers.placement_group_config is not None:
        fields["placement_group_config"] = routers.placement_group_config
    llm_config = LLMConfig(**fields)
    args = config.model_dump(exclude_unset=True)
    router = build_llm_deployment(llm_config, name_prefix="Router:", bind_kwargs={"mesh": args})
    return serve.deployment(
        ingress_class(config),
        name="Ingress",
        **{**INGRESS_OPTIONS, **config.http.deployment_config},
    ).bind(
        llm_deployments={config.model.id: router},
        model_cards={config.model.id: model_card(llm_config)},
        mesh=args,
    )


def _with_env(options: dict[str, Any], env_vars: dict[str, str]) -> dict[str, Any]:
    """Actor options whose runtime_env has `env_vars` where the user has not set them."""
    runtime_env = dict(options.get("runtime_env") or {})
    runtime_env["env_vars"] = {**env_vars, **(runtime_env.get("env_vars") or {})}
    return {**options, "runtime_env": runtime_env}
