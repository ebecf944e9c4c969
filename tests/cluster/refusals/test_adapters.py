"""What is refused of `lora_config` before Serve touches a replica, and the engine options that follow from it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cluster.config.apps import LLMAppConfig
from cluster.config.parse import ConfigError, parse
from cluster.refusals.applications import refuse_llm
from experts.vllm_plugin.engine_options import DEFAULT_MAX_LORA_RANK
from experts.vllm_plugin.source.vllm_source import VllmSource
from tests.support.random_adapters import write_files
from tests.support.serve.shipped_configs import CONFIGS


def llm(lora: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments of the shipped application `llm`, with adapters."""
    args: dict[str, Any] = yaml.safe_load((CONFIGS / "tiny-cpu.yaml").read_text())["applications"][1]["args"]
    return args if lora is None else {**args, "lora_config": lora}


def lines(args: dict[str, Any]) -> list[str]:
    try:
        refuse_llm(parse(LLMAppConfig, args))
    except ConfigError as error:
        return str(error).splitlines()
    return []


def test_adapters_that_are_here_are_looked_at(tmp_path: Path) -> None:
    names = {"good": "self_attn.q_proj", "routed": "mlp.experts.3.up_proj"}
    for name, layer in names.items():
        tensors = {f"base_model.model.model.layers.0.{layer}.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
        write_files(tmp_path / name, tensors, [layer.rpartition(".")[2]])
    args = llm({"dynamic_lora_loading_path": str(tmp_path)})
    [line] = lines(args)
    assert line.startswith(f"args.lora_config.dynamic_lora_loading_path: {tmp_path}/routed/adapter_model.safetensors ")
    assert "layers.0.mlp.experts.3.up_proj.lora_A.weight" in line
    args["routers"]["engine_kwargs"]["max_lora_rank"] = 1
    told = "\n".join(lines(args))
    args["routers"]["engine_kwargs"]["max_lora_rank"] = "many"
    assert any("max_lora_rank is 'many'" in line for line in lines(args))
    assert f"{tmp_path}/good/adapter_config.json: its rank is 4, more than max_lora_rank (1)" in told


def test_engines_have_room_for_as_many_adapters_as_a_router_keeps() -> None:
    args = llm({"dynamic_lora_loading_path": "s3://bucket/adapters", "max_num_adapters_per_replica": 3})
    options = parse(LLMAppConfig, args).engine_kwargs()
    assert (options["enable_lora"], options["max_loras"], options["max_cpu_loras"]) == (True, 3, 3)
    args["routers"]["engine_kwargs"] |= {"max_loras": 2, "enable_lora": True}
    options = parse(LLMAppConfig, args).engine_kwargs()
    assert (options["max_loras"], options["max_cpu_loras"]) == (2, 3)
    assert "enable_lora" not in parse(LLMAppConfig, llm(None)).engine_kwargs()


def test_vllms_default_rank_is_the_one_that_adapters_are_compared_with() -> None:
    source = VllmSource.installed()
    if source is None:
        pytest.skip("needs vllm")
    _, node = source.fields("vllm.config.lora", "LoRAConfig")["max_lora_rank"]
    assert ast.literal_eval(node.value) == DEFAULT_MAX_LORA_RANK  # type: ignore[arg-type]
