"""Experts read as they are stored: the bytes are the checkpoint's, the values those of `read_expert`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from experts.checkpoint import CheckpointError, ExpertCheckpoint
from experts.checkpoint.weight_format import WeightFormat
from tests.support.hub_names import FP8_CONFIG, deepseek_fp8, mxfp4_tensors, write

INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "actorder": None}
D, I, E = 96, 64, 3


def compressed(**weights: Any) -> dict[str, Any]:
    """quantization_config as compressed-tensors writes it (Kimi-K2-Thinking)."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**INT4, **weights}}},
        "ignore": ["lm_head"],
    }


def config_of(model_type: str, **more: Any) -> dict[str, Any]:
    config = {"model_type": model_type, "num_hidden_layers": 1, "hidden_size": D, "hidden_act": "silu"}
    config |= {"num_local_experts": E, "num_experts_per_tok": 2, "intermediate_size": I, "moe_intermediate_size": I}
    return config | more


def int4_checkpoint(folder: Path, **weights: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """(folder, plain values by the weights' names); the files have only the packed tensors."""
    generator = torch.Generator().manual_seed(3)
    stored: dict[str, torch.Tensor] = {}
    values: dict[str, torch.Tensor] = {}
    for expert in range(E):
        for name, (rows, columns) in (("gate_proj", (I, D)), ("up_proj", (I, D)), ("down_proj", (D, I))):
            stem = f"model.layers.0.mlp.experts.{expert}.{name}.weight"
            fours = torch.randint(-8, 8, (rows, columns), generator=generator)
            scale = torch.rand(rows, columns // 32, generator=generator).bfloat16()
            shifts = 4 * torch.arange(8)
            words = ((fours.view(rows, -1, 8) + 8) << shifts).sum(2)
            stored[stem + "_packed"] = torch.where(words >= 2**31, words - 2**32, words).int()
            stored[stem + "_scale"] = scale
            stored[stem + "_shape"] = torch.tensor([rows, columns])
            values[stem] = fours * scale.float().repeat_interleave(32, 1)
    config = config_of("kimi_k2", n_routed_experts=E, quantization_config=compressed(**weights))
    del config["num_local_experts"]
    return write(folder, config, stored), values


def assert_same_values(checkpoint: ExpertCheckpoint) -> None:
    for expert in range(checkpoint.spec.num_experts):
        for dtype in (torch.float32, torch.bfloat16):
            stored = checkpoint.read_quantized(0, expert)
            scales = torch.uint8 if stored.format.name == "mxfp4" else torch.float32
            assert (stored.w13_scale.dtype, stored.w2_scale.dtype) == (scales, scales)
            kept = stored.dequantize(dtype)
            read = checkpoint.read_expert(0, expert, dtype)
            for field in ("w13_2ID", "w2_DI", "b13_2I", "b2_D"):
                if getattr(read, field) is None:
                    assert getattr(kept, field) is None
                else:
                    assert torch.equal(getattr(kept, field), getattr(read, field)), field


def test_fp8_blocks(tmp_path: Path) -> None:
    folder, tensors = deepseek_fp8(tmp_path)  # partial blocks in both directions
    checkpoint = ExpertCheckpoint.open(folder)
    assert checkpoint.weight_format == WeightFormat("fp8_block", 128)
    assert_same_values(checkpoint)
    kept = checkpoint.read_quantized(0, 1)
    stem = "model.layers.1.mlp.experts.1."
    stored = torch.cat([tensors[f"{stem}{name}.weight"].view(torch.uint8) for name in ("gate_proj", "up_proj")])
    assert torch.equal(kept.w13_2IB, stored)
    assert torch.equal(kept.w2_DB, tensors[f"{stem}down_proj.weight"].view(torch.uint8))
    assert kept.nbytes == checkpoint.expert_bytes


def test_mxfp4_comes_apart_into_gate_and_up(tmp_path: Path) -> None:
    tensors = mxfp4_tensors(E, D, I)
    config = config_of("gpt_oss", quantization_config={"quant_method": "mxfp4"})
    checkpoint = ExpertCheckpoint.open(write(tmp_path, config, tensors))
    assert checkpoint.weight_format == WeightFormat("mxfp4", 32)
    assert_same_values(checkpoint)
    rows = tensors["model.layers.0.mlp.experts.gate_up_proj_blocks"][2].view(2 * I, D // 2)
    assert torch.equal(checkpoint.read_quantized(0, 2).w13_2IB, torch.cat([rows[0::2], rows[1::2]]))


def test_int4_of_compressed_tensors(tmp_path: Path) -> None:
    folder, values = int4_checkpoint(tmp_path)
    checkpoint = ExpertCheckpoint.open(folder)
    checkpoint.check()
    assert checkpoint.spec.quantization == "int4"
    assert checkpoint.weight_format == WeightFormat("int4", 32)
    assert checkpoint.expert_bytes == 3 * D * I // 2 + 3 * D * I // 32 * 2
    for suffix in ("_packed", "_scale", "_shape"):
        assert checkpoint.owns(f"model.layers.0.mlp.experts.0.up_proj.weight{suffix}")
    assert not checkpoint.owns("model.layers.0.mlp.shared_experts.up_proj.weight_packed")
    assert_same_values(checkpoint)
    stem = "model.layers.0.mlp.experts.1."
    expected = torch.cat([values[f"{stem}gate_proj.weight"], values[f"{stem}up_proj.weight"]])
    got = checkpoint.read_expert(0, 1, torch.float32)
    assert torch.equal(got.w13_2ID, expected)
    assert torch.equal(got.w2_DI, values[f"{stem}down_proj.weight"])


def test_plain_experts_have_no_format(tmp_path: Path) -> None:
    folder, tensors = deepseek_fp8(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == FP8_CONFIG
    # A quantized model whose experts were not quantized.
    plain = {k: v.to(torch.bfloat16) for k, v in tensors.items() if not k.endswith("_scale_inv")}
    checkpoint = ExpertCheckpoint.open(write(tmp_path, config, plain))
    assert checkpoint.weight_format is None
    with pytest.raises(CheckpointError, match="are not all stored quantized"):
        checkpoint.read_quantized(0, 0)


@pytest.mark.parametrize("expert", [0, 1])
def test_an_expert_that_was_left_out_leaves_the_model_without_a_format(tmp_path: Path, expert: int) -> None:
    """Whichever it is: kernels on stored bytes could not take it."""
    folder, tensors = deepseek_fp8(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    stem = f"model.layers.1.mlp.experts.{expert}.down_proj.weight"
    plain = {**tensors, stem: tensors[stem].to(torch.bfloat16)}
    del plain[stem + "_scale_inv"]
    checkpoint = ExpertCheckpoint.open(write(tmp_path, config, plain))
    checkpoint.check()
    assert checkpoint.weight_format is None
    assert torch.equal(checkpoint.read_expert(0, expert, torch.float32).w2_DI, plain[stem].float())
    # Of a file that was not fetched, the names tell it.
    write(tmp_path, config, plain, num_files=2)
    files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    (folder / files[stem]).unlink()
    assert ExpertCheckpoint.open(folder).weight_format is None
    write(tmp_path, config, tensors, num_files=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    partial = ExpertCheckpoint.open(folder)
    partial.check(only_here=True)
    assert partial.weight_format == WeightFormat("fp8_block", 128)


def test_a_place_that_is_none_is_named(tmp_path: Path) -> None:
    checkpoint = ExpertCheckpoint.open(deepseek_fp8(tmp_path)[0])
    with pytest.raises(ValueError, match=r"expert is 2, expected 0\.\.1"):
        checkpoint.read_quantized(0, 2)
