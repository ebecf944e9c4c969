"""What an adapter changes, told from its files: every reason not to serve it, by name, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from experts.checkpoint.adapters import adapter_folders, adapter_problems, touches_routed_experts
from experts.checkpoint.families import FAMILIES
from tests.support.random_adapters import write_files

BASE = "base_model.model.model.layers.1."


def adapter(folder: Path, *layers: str, **config: Any) -> Path:
    tensors = {f"{BASE}{layer}.lora_{side}.weight": torch.ones(4, 4) for layer in layers for side in "AB"}
    write_files(folder / "adapter", tensors, config.pop("target_modules", []), **config)
    return folder / "adapter"


def test_attention_shared_experts_dense_mlps_gates_and_the_head_are_possible(tmp_path: Path) -> None:
    layers = (
        "self_attn.q_proj",
        "mlp.shared_experts.up_proj",
        "mlp.shared_expert.up_proj",
        "mlp.down_proj",
        "mlp.gate",
    )
    assert list(adapter_problems(adapter(tmp_path, *layers, "lm_head"), max_rank=4)) == []


@pytest.mark.parametrize(
    "layer",
    [
        "mlp.experts.3.gate_proj",
        "mlp.experts.base_layer",
        "mlp.experts",
        "block_sparse_moe.experts.0.w1",
        "ffn.experts.mlp",
    ],
)
def test_routed_experts_are_named(tmp_path: Path, layer: str) -> None:
    target = layer.rpartition(".")[2]
    [line] = adapter_problems(adapter(tmp_path, "self_attn.q_proj", layer, target_modules=["q_proj", target]))
    assert f"changes routed experts, which stand on shards and serve every adapter alike: {BASE}{layer}.lora_A" in line
    assert f"(adapter_config.json targets target_modules: {target})" in line
    assert "self_attn.q_proj" not in line
    assert line.endswith(
        "possible are attention, shared experts, dense MLPs, gates, and the head where vLLM's model class has it"
    )


def test_many_tensors_are_counted(tmp_path: Path) -> None:
    layers = [f"mlp.experts.{expert}.up_proj" for expert in range(40)]
    [line] = adapter_problems(adapter(tmp_path, *layers))
    assert "and 77 more" in line


def test_a_fused_parameter_is_named_as_the_config_has_it(tmp_path: Path) -> None:
    folder = adapter(tmp_path, "mlp.experts", target_parameters=["mlp.experts.down_proj"])
    [line] = adapter_problems(folder)
    assert "targets target_parameters: mlp.experts.down_proj" in line


@pytest.mark.parametrize("part", ["self_attn.kv_b_proj", "mlp.shared_expert_gate"])
def test_what_would_have_no_effect_is_named(tmp_path: Path, part: str) -> None:
    [line] = adapter_problems(adapter(tmp_path, part))
    assert f"changes {part.rpartition('.')[2]}, which would have no effect" in line


def test_every_familys_experts_are_told_by_their_names() -> None:
    names = [part.name for family in FAMILIES for layout in family.layouts for part in layout.parts]
    assert all(touches_routed_experts(f"base_model.model.model.{name}.lora_A.weight") for name in names)


@pytest.mark.parametrize(("config", "rank"), [({"r": 64}, 64), ({"rank_pattern": {"q_proj": 32}}, 32)])
def test_a_rank_that_is_too_large(tmp_path: Path, config: dict[str, Any], rank: int) -> None:
    folder = adapter(tmp_path, "self_attn.q_proj", **config)
    [line] = adapter_problems(folder, max_rank=16)
    assert line.endswith(f"its rank is {rank}, more than max_lora_rank (16)")
    assert list(adapter_problems(folder)) == []


def test_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    folder = adapter(tmp_path, "self_attn.q_proj")
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:40])
    [line] = adapter_problems(folder)
    assert line.startswith(f"{weights}: header length")
    weights.unlink()
    assert list(adapter_problems(folder)) == [f"{weights}: the file is missing"]
    for text, expected in (("{", "cannot be read as JSON"), ("[]", "expected a JSON object, found list")):
        config.write_text(text)
        [line] = adapter_problems(folder)
        assert line.startswith(f"{config}: {expected}")
    config.unlink()
    [line] = adapter_problems(folder)
    assert line == f"{config}: the file is missing; expected an adapter as PEFT saves it"


def test_odd_values_in_the_config_are_no_fault_of_ours(tmp_path: Path) -> None:
    """vLLM says what is wrong with them when it loads the adapter."""
    folder = adapter(tmp_path, "self_attn.q_proj")
    (folder / "adapter_config.json").write_text(json.dumps({"r": "8", "rank_pattern": [1], "target_modules": 3}))
    assert list(adapter_problems(folder, max_rank=4)) == []


def test_the_adapters_of_a_folder(tmp_path: Path) -> None:
    for name in ("b", "a", ".git"):
        (tmp_path / name).mkdir()
    (tmp_path / "README.md").write_text("")
    assert [path.name for path in adapter_folders(tmp_path)] == ["a", "b"]
