"""FP8 blocks and MXFP4 against float64 arithmetic written from their definitions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from experts.checkpoint import CheckpointError, ExpertCheckpoint
from experts.checkpoint.dequantize import dequantize_fp8_block, dequantize_mxfp4
from tests.support.hub_names import FP8, deepseek_fp8, mxfp4_tensors, random_fp8, write


def fp8_value(byte: int) -> float:
    """E4M3 (OCP 8-bit floating point, finite variant): 4 exponent bits with bias 7, 3 mantissa bits."""
    sign, exponent, mantissa = byte >> 7, (byte >> 3) & 15, byte & 7
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def fp8_oracle(weight: torch.Tensor, scale: torch.Tensor, block: int) -> np.ndarray:
    raw, scales = weight.view(torch.uint8).numpy(), scale.double().numpy()
    table = np.array([math.nan if byte & 127 == 127 else fp8_value(byte) for byte in range(256)])
    rows, columns = np.indices(raw.shape)
    return table[raw] * scales[rows // block, columns // block]


def fp4_value(nibble: int) -> float:
    """E2M1: 2 exponent bits with bias 1, 1 mantissa bit."""
    sign, exponent, mantissa = nibble >> 3, (nibble >> 1) & 3, nibble & 1
    size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -size if sign else size


def mxfp4_oracle(blocks: torch.Tensor, scales: torch.Tensor) -> np.ndarray:
    raw = blocks.numpy()
    nibbles = np.stack([raw & 15, raw >> 4], axis=-1).reshape(*raw.shape[:-1], 32)
    table = np.array([fp4_value(n) for n in range(16)])
    factor = 2.0 ** (scales.numpy().astype(np.float64) - 127)
    return (table[nibbles] * factor[..., None]).reshape(raw.shape[0], -1)


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (130, 127), (1, 1), (300, 64)])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_blocks(shape: tuple[int, int], scale_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = random_fp8(shape, generator)
    blocks = tuple(math.ceil(n / 128) for n in shape)
    scale = (torch.rand(blocks, generator=generator) * 0.1 + 0.01).to(scale_dtype)
    got = dequantize_fp8_block(weight, scale, 128, torch.float32)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.double().numpy(), fp8_oracle(weight, scale.float(), 128), rtol=2**-23)
    assert torch.equal(dequantize_fp8_block(weight, scale, 128, torch.bfloat16), got.to(torch.bfloat16))


def test_fp8_covers_every_byte() -> None:
    weight = torch.arange(256, dtype=torch.uint8).view(FP8).reshape(2, 128)
    got = dequantize_fp8_block(weight, torch.ones(1, 1), 128, torch.float32)
    assert np.array_equal(got.double().numpy(), fp8_oracle(weight, torch.ones(1, 1), 128), equal_nan=True)


@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (6, 3), (64, 2)])
def test_mxfp4(rows: int, blocks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(256, (rows, blocks, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(250, (rows, blocks), dtype=torch.uint8, generator=generator)  # larger ones give infinity
    got = dequantize_mxfp4(packed, scales)
    assert np.array_equal(got.double().numpy(), mxfp4_oracle(packed, scales))


def test_mxfp4_covers_every_byte() -> None:
    packed = torch.arange(256, dtype=torch.uint8).reshape(16, 1, 16)
    scales = torch.full((16, 1), 127, dtype=torch.uint8)
    assert np.array_equal(dequantize_mxfp4(packed, scales).double().numpy(), mxfp4_oracle(packed, scales))


def test_a_checkpoint_in_fp8_blocks(tmp_path: Path) -> None:
    folder, tensors = deepseek_fp8(tmp_path)
    checkpoint = ExpertCheckpoint.open(folder)
    checkpoint.check()
    assert checkpoint.spec.quantization == "fp8_block"
    assert checkpoint.expert_bytes == 3 * 200 * 136 + 3 * 4 * 4
    assert all(checkpoint.owns(name) for name in tensors)
    for expert in range(2):
        stem = f"model.layers.1.mlp.experts.{expert}."
        gate, up, down = (
            fp8_oracle(tensors[f"{stem}{n}.weight"], tensors[f"{stem}{n}.weight_scale_inv"], 128)
            for n in ("gate_proj", "up_proj", "down_proj")
        )
        got = checkpoint.read_expert(0, expert, torch.float32)
        np.testing.assert_allclose(got.w13_2ID.double().numpy(), np.concatenate([gate, up]), rtol=2**-23)
        np.testing.assert_allclose(got.w2_DI.double().numpy(), down, rtol=2**-23)
        low = checkpoint.read_expert(0, expert, torch.bfloat16)
        assert torch.equal(low.w2_DI, got.w2_DI.to(torch.bfloat16))


def test_fp8_scale_is_missing_or_misshapen(tmp_path: Path) -> None:
    folder, tensors = deepseek_fp8(tmp_path)
    name = "model.layers.1.mlp.experts.1.up_proj.weight_scale_inv"
    config = (folder / "config.json").read_text()
    write(folder, {}, {key: value for key, value in tensors.items() if key != name})
    (folder / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=f"tensor {name} is missing"):
        ExpertCheckpoint.open(folder).check()
    write(folder, {}, {**tensors, name: torch.ones(1, 1)})
    (folder / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[1, 1\], expected \[2, 2\]"):
        ExpertCheckpoint.open(folder).check()


def test_fp8_tensors_without_a_quantization_config_are_refused(tmp_path: Path) -> None:
    folder, _ = deepseek_fp8(tmp_path)
    config = (folder / "config.json").read_text().replace("quantization_config", "unrelated")
    (folder / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"is F8_E4M3, expected float32, .*quantization in config\.json: none"):
        ExpertCheckpoint.open(folder).check()


def test_modules_that_fp8_leaves_out_are_read_plainly(tmp_path: Path) -> None:
    folder, tensors = deepseek_fp8(tmp_path)
    config = (folder / "config.json").read_text()
    plain = {k: v.to(torch.bfloat16) for k, v in tensors.items() if not k.endswith("_scale_inv")}
    write(folder, {}, plain)
    (folder / "config.json").write_text(config)
    checkpoint = ExpertCheckpoint.open(folder)
    checkpoint.check()
    got = checkpoint.read_expert(0, 1, torch.bfloat16)
    assert torch.equal(got.w2_DI, plain["model.layers.1.mlp.experts.1.down_proj.weight"])


def test_gpt_oss_in_mxfp4(tmp_path: Path) -> None:
    E, D, I = 3, 64, 96
    config = {"model_type": "gpt_oss", "num_hidden_layers": 1, "num_local_experts": E, "num_experts_per_tok": 2}
    config |= {"hidden_size": D, "intermediate_size": I, "hidden_act": "silu", "swiglu_limit": 7.0}
    config |= {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]}}
    stem, tensors = "model.layers.0.mlp.experts.", mxfp4_tensors(E, D, I)
    checkpoint = ExpertCheckpoint.open(write(tmp_path, config, tensors))
    checkpoint.check()
    assert checkpoint.spec.quantization == "mxfp4"
    assert all(checkpoint.owns(name) for name in tensors)
    assert checkpoint.expert_bytes == 3 * D * I // 2 + 3 * D * I // 32 + 2 * (2 * I + D)
    for expert in range(E):
        got = checkpoint.read_expert(0, expert, torch.float32)
        rows = mxfp4_oracle(
            tensors[stem + "gate_up_proj_blocks"][expert], tensors[stem + "gate_up_proj_scales"][expert]
        )
        assert np.array_equal(got.w13_2ID.double().numpy(), np.concatenate([rows[0::2], rows[1::2]]))
        down = mxfp4_oracle(tensors[stem + "down_proj_blocks"][expert], tensors[stem + "down_proj_scales"][expert])
        assert np.array_equal(got.w2_DI.double().numpy(), down)
        bias = tensors[stem + "gate_up_proj_bias"][expert].float()
        assert got.b13_2I is not None
        assert torch.equal(got.b13_2I, torch.cat([bias[0::2], bias[1::2]]))
        assert got.b2_D is not None
        assert torch.equal(got.b2_D, tensors[stem + "down_proj_bias"][expert].float())
