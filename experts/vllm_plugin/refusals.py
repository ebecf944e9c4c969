"""Refuses, at start and by name, engine settings that the plug-in does not support."""

from __future__ import annotations

import os

from experts.checkpoint.sources.opening import local_folder
from experts.protocol.errors import UnsupportedModelError
from experts.protocol.settings import RouterSettings
from experts.vllm_plugin.joints import (
    VllmConfig,
    expertmesh_settings,
    split_graphs_at_moe,
)


def check_engine(config: VllmConfig) -> RouterSettings:
    """Refuse engine settings that are not supported (UnsupportedModelError); return the router's settings."""
    data = expertmesh_settings(config)
    if data is None:
        raise UnsupportedModelError(
            "this process has expertmesh's layers registered, but the engine has no additional_config['expertmesh']"
        )
    parallel = config.parallel_config
    for name, reason in (
        ("tensor_parallel_size", "run more routers instead: attention is small without the experts"),
        ("pipeline_parallel_size", "run more routers instead"),
        ("data_parallel_size", "run more routers instead: they need no lockstep"),
    ):
        value = getattr(parallel, name, 1)
        if value != 1:
            raise UnsupportedModelError(f"{name}={value} is not supported, expected 1; {reason}")
    for name in ("enable_expert_parallel", "enable_eplb", "enable_dbo"):
        if getattr(parallel, name, False):
            raise UnsupportedModelError(
                f"{name} is not supported: experts live on shards, which place and balance them"
            )
    if config.lora_config is not None:
        raise UnsupportedModelError("LoRA is not supported together with experts on shards")
    settings = RouterSettings.model_validate(data)
    if settings.membership is None and not settings.membership_by_rpc:
        raise UnsupportedModelError(
            "additional_config['expertmesh'] names no shards, so nobody would compute the experts: expected "
            "`membership`, or `membership_by_rpc: true` from whoever hands one over before the first request"
        )
    model = config.model_config.model
    if os.path.isdir(model) and os.path.realpath(model) != os.path.realpath(local_folder(settings.model_path)):
        raise UnsupportedModelError(f"the engine serves {model}, but its experts are those of {settings.model_path}")
    return settings


def split_graphs(config: VllmConfig, device: str) -> None:
    """On GPUs, split CUDA graphs at MoE layers: a captured dispatch would be replayed without asking the shards."""
    if not device.startswith("cuda") or config.model_config.enforce_eager:
        return
    mode = str(getattr(config.compilation_config, "cudagraph_mode", "NONE")).upper()
    if "FULL" in mode:
        raise UnsupportedModelError(
            f"cudagraph_mode {mode} would capture the dispatch, expected PIECEWISE or NONE; "
            "experts.vllm_plugin.engine_kwargs.router_engine_kwargs sets it"
        )
    split_graphs_at_moe(config)
