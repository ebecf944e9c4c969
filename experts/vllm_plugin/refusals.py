"""Refuses, at start and by name, engine settings that the plug-in does not support."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from experts.checkpoint.adapters import adapter_problems
from experts.checkpoint.sources.opening import local_folder
from experts.protocol.errors import UnsupportedModelError
from experts.protocol.settings import RouterSettings
from experts.vllm_plugin.engine_options import MTP, refused_lora_targets
from experts.vllm_plugin.joints import (
    VllmConfig,
    expertmesh_settings,
    guesses_by_mtp,
    longest_step_s,
    split_graphs_at_moe,
)
from experts.vllm_plugin.pooling.options import refused_with_pooling
from experts.vllm_plugin.pooling.steps import pools


def check_engine(config: VllmConfig) -> RouterSettings:
    """Refuse engine settings that are not supported (UnsupportedModelError); return the router's settings."""
    data = expertmesh_settings(config)
    if data is None:
        raise UnsupportedModelError(
            "this process has expertmesh's layers registered, but the engine has no additional_config['expertmesh']"
        )
    parallel = config.parallel_config
    for name, reason in (
        ("pipeline_parallel_size", "run more routers instead, or set tensor_parallel_size"),
        ("prefill_context_parallel_size", "run more routers instead, or set tensor_parallel_size"),
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
    if pools(config):
        asked = {"io_processor_plugin": config.model_config.io_processor_plugin, "enable_lora": config.lora_config}
        asked |= {name: getattr(config, name) for name in ("speculative_config", "kv_transfer_config")}
        for problem in refused_with_pooling(asked):
            raise UnsupportedModelError(problem)
    if config.lora_config is not None:
        for problem in refused_lora_targets(config.lora_config.target_modules or ()):
            raise UnsupportedModelError(problem)
    settings = RouterSettings.model_validate(data)
    if settings.membership is None and not settings.membership_by_rpc:
        raise UnsupportedModelError(
            "additional_config['expertmesh'] names no shards, so nobody would compute the experts: expected "
            "`membership`, or `membership_by_rpc: true` from whoever hands one over before the first request"
        )
    if guesses_by_mtp(config):
        if not settings.mtp:
            raise UnsupportedModelError(f"speculative_config.method is 'mtp', but {MTP}")
        draft = config.speculative_config.draft_model_config.model
        if draft != config.model_config.model:
            raise UnsupportedModelError(
                f"speculative_config.model is {draft}, but the shards hold the experts of the MTP layer of "
                f"{config.model_config.model}: leave it out"
            )
    dispatch_s, step_s = settings.dispatch_timeout_ms / 1000, longest_step_s()
    if parallel.tensor_parallel_size > 1 and dispatch_s >= step_s:
        raise UnsupportedModelError(
            f"a dispatch may take {dispatch_s:g} s, but vLLM gives up an engine of several workers whose step takes "
            f"{step_s:g} s: lower deadlines.dispatch_ms, or raise VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"
        )
    model = config.model_config.model
    if os.path.isdir(model) and os.path.realpath(model) != os.path.realpath(local_folder(settings.model_path)):
        raise UnsupportedModelError(f"the engine serves {model}, but its experts are those of {settings.model_path}")
    return settings


def refuse_adapter(folder: Path) -> None:
    """Refuse a LoRA adapter that its engine cannot apply as a whole: UnsupportedModelError, a line for each reason."""
    problems = list(adapter_problems(folder))
    if problems:
        raise UnsupportedModelError("\n".join(problems))


def check_layer(prefix: str, moe_config: Any, config: VllmConfig) -> None:
    """Refuse a MoE layer whose output vLLM does not add up over the engine's workers: each computes some of the rows.

    UnsupportedModelError, which names the layer.
    """
    if moe_config.is_sequence_parallel:
        raise UnsupportedModelError(
            f"{prefix} is sequence-parallel: every worker has rows of its own there, expected all rows; run more "
            "routers instead of tensor_parallel_size"
        )
    workers = config.parallel_config.tensor_parallel_size
    if moe_config.tp_size != workers:
        raise UnsupportedModelError(
            f"{prefix} is not split over the engine's {workers} workers (its tensor-parallel size is "
            f"{moe_config.tp_size}), so vLLM would not add up what they compute; expected tensor_parallel_size=1"
        )


def check_draft(prefix: str, config: VllmConfig, num_built: int, num_decoder_layers: int) -> bool:
    """Whether a MoE layer comes after all of the engine's own, which means that it guesses tokens.

    UnsupportedModelError names a layer that guesses, and whose experts no shard has.
    """
    speculative = config.speculative_config
    if speculative is None or num_built < num_decoder_layers:
        return False
    if not guesses_by_mtp(config) or num_built > num_decoder_layers:
        raise UnsupportedModelError(
            f"{prefix} is a MoE layer of the draft ({speculative.method}), whose experts are on no shard: "
            "speculative_config takes mtp with one MTP layer, and other methods without routed experts in their draft"
        )
    return True


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
