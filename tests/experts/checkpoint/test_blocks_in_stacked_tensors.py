"""FP8 blocks in tensors that hold all experts of a layer, also transposed: no shape is square, no scale occurs twice.

Legend: E experts, D hidden size, I expert intermediate size.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experts.checkpoint import CheckpointError, ExpertCheckpoint
from experts.checkpoint.weight_format import WeightFormat
from tests.support.hub_names import write

E, D, I = 3, 130, 300  # 2 blocks of columns; 5 of rows of gate and up together, of which one spans both
BLOCK = 128


def stacked(rows: int, columns: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 [E, rows, columns] and a different scale for every block of every expert."""
    weight = (torch.randn((E, rows, columns), generator=generator) * 50).to(torch.float8_e4m3fn)
    shape = (E, math.ceil(rows / BLOCK), math.ceil(columns / BLOCK))
    return weight, (1.0 + torch.randperm(math.prod(shape), generator=generator).float() / 8).reshape(shape)


def values(weight: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
    """One expert's stored matrix in float64, one element after the other."""
    found, scales = weight.double().numpy(), scale.double().numpy()
    for row, column in np.ndindex(*found.shape):
        found[row, column] *= scales[row // BLOCK, column // BLOCK]
    return found


def config(model_type: str, **more: Any) -> dict[str, Any]:
    fp8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    known = {"model_type": model_type, "num_hidden_layers": 1, "num_experts": E, "num_experts_per_tok": 2}
    known |= {"hidden_size": D, "moe_intermediate_size": I, "hidden_act": "silu", "quantization_config": fp8}
    return known | more


def fused(folder: Path, model_type: str, transposed: bool, inner: int = I) -> tuple[ExpertCheckpoint, dict[str, Any]]:
    generator = torch.Generator().manual_seed(4)
    stem = "model.layers.0.mlp.experts."
    tensors: dict[str, torch.Tensor] = {}
    for name, (rows, columns) in (("gate_up_proj", (2 * inner, D)), ("down_proj", (D, inner))):
        shape = (columns, rows) if transposed else (rows, columns)
        tensors[stem + name], tensors[f"{stem}{name}_scale_inv"] = stacked(*shape, generator)
    checkpoint = ExpertCheckpoint.open(write(folder, config(model_type, moe_intermediate_size=inner), tensors))
    checkpoint.check()
    assert all(checkpoint.owns(name) for name in tensors)
    return checkpoint, {name.removeprefix(stem): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("transposed", [False, True])
def test_each_block_is_scaled_by_its_own_scale(tmp_path: Path, transposed: bool) -> None:
    checkpoint, stored = fused(tmp_path, "qwen3_vl_moe" if transposed else "qwen3_moe", transposed)
    assert checkpoint.spec.quantization == "fp8_block"
    for expert in range(E):
        gate_up, down = (
            values(stored[n][expert], stored[n + "_scale_inv"][expert]) for n in ("gate_up_proj", "down_proj")
        )
        for dtype in (torch.float32, torch.bfloat16):
            got = checkpoint.read_expert(0, expert, dtype)
            for found, expected in ((got.w13_2ID, gate_up), (got.w2_DI, down)):
                assert found.is_contiguous()
                assert found.dtype == dtype
                # A product of an FP8 and an eighth is exact in float32, and rounded once to bfloat16.
                wanted = torch.from_numpy(expected.T.copy() if transposed else expected).to(dtype)
                assert torch.equal(found, wanted)


def test_transposed_blocks_are_kept_by_no_kernel(tmp_path: Path) -> None:
    checkpoint, _ = fused(tmp_path, "qwen3_vl_moe", transposed=True)
    assert checkpoint.weight_format is None
    with pytest.raises(CheckpointError, match="qwen3_vl_moe are not all stored quantized"):
        checkpoint.read_quantized(0, 0)


@pytest.mark.parametrize("inner", [129, 300])
def test_a_block_that_spans_gate_and_up_keeps_experts_from_being_taken_as_stored(tmp_path: Path, inner: int) -> None:
    checkpoint, _ = fused(tmp_path, "qwen3_moe", transposed=False, inner=inner)
    assert checkpoint.weight_format is None
    with pytest.raises(CheckpointError, match="are not all stored quantized"):
        checkpoint.read_quantized(0, 0)


@pytest.mark.parametrize("inner", [128, 256])
def test_blocks_that_end_with_the_gate_are_taken_as_stored(tmp_path: Path, inner: int) -> None:
    checkpoint, stored = fused(tmp_path, "qwen3_moe", transposed=False, inner=inner)
    assert checkpoint.weight_format == WeightFormat("fp8_block", BLOCK)
    for expert in range(E):
        kept, read = checkpoint.read_quantized(0, expert), checkpoint.read_expert(0, expert, torch.float32)
        assert torch.equal(kept.w13_2IB, stored["gate_up_proj"][expert].view(torch.uint8))
        assert torch.equal(kept.w2_DB, stored["down_proj"][expert].view(torch.uint8))
        assert torch.equal(kept.w13_scale, stored["gate_up_proj_scale_inv"][expert])
        assert torch.equal(kept.w2_scale, stored["down_proj_scale_inv"][expert])
        assert torch.equal(kept.dequantize(torch.float32).w13_2ID, read.w13_2ID)


def test_a_scale_that_stands_the_other_way_round_is_refused(tmp_path: Path) -> None:
    weight, scale = stacked(D, 2 * I, torch.Generator().manual_seed(0))
    stem = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {stem: weight, stem + "_scale_inv": scale.transpose(1, 2).contiguous()}
    checkpoint = ExpertCheckpoint.open(write(tmp_path, config("qwen3_vl_moe"), tensors))
    with pytest.raises(CheckpointError, match=r"gate_up_proj_scale_inv has shape \[3, 5, 2\], expected \[3, 2, 5\]"):
        checkpoint.check()


def test_blocks_in_one_tall_matrix_are_refused(tmp_path: Path) -> None:
    stem = "transformer.blocks.0.ffn.experts.mlp."
    tensors = {stem + name: torch.zeros(E * I, D).to(torch.float8_e4m3fn) for name in ("w1", "v1", "w2")}
    known = config("dbrx", n_layers=1, d_model=D)
    known["ffn_config"] = {"moe_num_experts": E, "moe_top_k": 2, "ffn_hidden_size": I}
    checkpoint = ExpertCheckpoint.open(write(tmp_path, known, tensors))
    with pytest.raises(CheckpointError, match=r"mlp\.w1: FP8 in squares .* stacked rows"):
        checkpoint.check()


@pytest.mark.parametrize(
    ("hidden", "inner", "message"),
    [(64, 48, "down_proj_blocks: 48 columns"), (48, 64, "gate_up_proj_blocks: 48 columns")],
)
def test_mxfp4_rows_that_do_not_fill_their_groups_are_refused(
    tmp_path: Path, hidden: int, inner: int, message: str
) -> None:
    stem = "model.layers.0.mlp.experts."
    tensors = {
        f"{stem}{part}{suffix}": torch.zeros(E, 4, 1, dtype=torch.uint8)
        for part in ("gate_up_proj", "down_proj")
        for suffix in ("_blocks", "_scales", "_bias")
    }
    tensors[stem + "gate_up_proj_blocks"] = torch.zeros(E, 2 * inner, hidden // 32, 16, dtype=torch.uint8)
    tensors[stem + "gate_up_proj_scales"] = torch.zeros(E, 2 * inner, hidden // 32, dtype=torch.uint8)
    tensors[stem + "gate_up_proj_bias"] = torch.zeros(E, 2 * inner)
    known = config("gpt_oss", hidden_size=hidden, intermediate_size=inner, num_local_experts=E)
    known["quantization_config"] = {"quant_method": "mxfp4"}
    with pytest.raises(CheckpointError, match=message):
        ExpertCheckpoint.open(write(tmp_path, known, tensors)).check()
