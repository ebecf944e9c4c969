"""ModelOpt's formats in tensors of all experts, as Llama 4 has them, and models whose quantized experts stand apart
though their floats do not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experts.checkpoint import CheckpointError, ExpertCheckpoint
from experts.checkpoint.architectures.table import State
from experts.checkpoint.architectures.verdict import verdict_on
from experts.checkpoint.hf_config import ModelConfig
from experts.checkpoint.sizes.architecture import facts_of
from tests.support.hub_names import write
from tests.support.quantized_checkpoint import LAYERS, D, E, I, quantized, stem
from tests.support.quantized_formats import FORMATS, f64

MODELOPT = {"fp8_modelopt": 0.03125, "nvfp4_modelopt": 1 / 1234.5}  # with the float that a layer's matrices share
TEXT: dict[str, Any] = {
    "model_type": "llama4_text",
    "num_hidden_layers": LAYERS,
    "num_local_experts": E,
    "num_experts_per_tok": 1,
    "hidden_size": D,
    "intermediate_size": I,
    "hidden_act": "silu",
    "interleave_moe_layer_step": 1,
}
STEM = "language_model.model.layers.{}.feed_forward.experts."
Values = dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]


def llama4(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], Values]:
    """config.json, tensors, and float64 values of (gate_up [2I, D], down [D, I]) by layer and expert."""
    rng, form, shared = np.random.default_rng(3), FORMATS[name], MODELOPT[name]
    config = {"model_type": "llama4", "text_config": TEXT, "quantization_config": form.config}
    tensors: dict[str, torch.Tensor] = {}
    values: Values = {}
    for layer in range(LAYERS):
        found = []
        for part, shape in (("gate_up_proj", (2 * I, D)), ("down_proj", (D, I))):
            matrices = [form.make(*shape, rng, None) for _ in range(E)]
            module = STEM.format(layer) + part
            tensors[module] = torch.stack([each.tensors["weight"].t() for each in matrices]).contiguous()
            number = torch.tensor(shared if part == "down_proj" else shared / 2)
            if name == "fp8_modelopt":
                tensors[module + "_weight_scale"] = number
                found.append([f64(each.tensors["weight"].float()) * float(number) for each in matrices])
            else:
                scales = [each.tensors["weight_scale"].t() for each in matrices]
                tensors[module + "_weight_scale"] = torch.stack(scales).contiguous()
                tensors[module + "_weight_scale_2"] = number.view(1)
                own = float(matrices[0].tensors["weight_scale_2"])
                found.append([each.values / own * float(number) for each in matrices])
            tensors[module + "_input_scale"] = torch.tensor(0.5)
        values |= {(layer, expert): (found[0][expert], found[1][expert]) for expert in range(E)}
    write(folder, config, tensors)
    return config, tensors, values


@pytest.mark.parametrize("name", MODELOPT)
def test_values_of_stacked_tensors_are_those_of_float64(tmp_path: Path, name: str) -> None:
    _, tensors, values = llama4(tmp_path, name)
    checkpoint = ExpertCheckpoint.open(tmp_path)
    checkpoint.check()
    assert checkpoint.spec.quantization == FORMATS[name].name
    assert all(checkpoint.owns(tensor) for tensor in tensors)
    assert not checkpoint.owns("language_model.model.layers.0.feed_forward.shared_expert.gate_proj.weight_scale")
    assert checkpoint.weight_format is None, "kernels do not take transposed ones"
    for (layer, expert), expected in values.items():
        read = checkpoint.read_expert(layer, expert, torch.float32)
        for found, wanted in zip((read.w13_2ID, read.w2_DI), expected, strict=True):
            assert found.is_contiguous()
            np.testing.assert_allclose(found.double().numpy(), wanted, rtol=2**-22, atol=0)  # two roundings
        low = checkpoint.read_expert(layer, expert, torch.bfloat16)
        assert torch.equal(low.w13_2ID, read.w13_2ID.bfloat16())


@pytest.mark.parametrize("name", MODELOPT)
def test_what_a_stacked_tensor_lacks_is_named(tmp_path: Path, name: str) -> None:
    config, tensors, _ = llama4(tmp_path, name)
    scale = STEM.format(1) + "down_proj_weight_scale"
    without = {key: tensor for key, tensor in tensors.items() if key != scale}
    with pytest.raises(CheckpointError, match=f"tensor {scale} is missing"):
        ExpertCheckpoint.open(write(tmp_path, config, without)).check()
    with pytest.raises(CheckpointError, match=rf"{scale} has shape \[{E}, 7\], expected"):
        ExpertCheckpoint.open(write(tmp_path, config, {**tensors, scale: torch.zeros(E, 7)})).check()


@pytest.mark.parametrize(
    ("name", "model_type"), [("fp8_modelopt", "qwen3_moe"), ("nvfp4_modelopt", "qwen3_moe"), ("fp8", "llama4_text")]
)
def test_stacked_tensors_that_nobody_publishes_are_refused(tmp_path: Path, name: str, model_type: str) -> None:
    """ModelOpt's that are not transposed, and FP8 of other tools."""
    shape = (E, D, 2 * I) if model_type == "llama4_text" else (E, 2 * I, D)
    module = "model.layers.0." + ("feed_forward" if model_type == "llama4_text" else "mlp") + ".experts.gate_up_proj"
    config = {**TEXT, "model_type": model_type, "quantization_config": FORMATS[name].config}
    config |= {"num_experts": E, "moe_intermediate_size": I}
    write(tmp_path, config, {module: torch.zeros(shape).to(torch.float8_e4m3fn)})
    with pytest.raises(CheckpointError, match=r"gate_up_proj: .* is not supported in a tensor of all experts"):
        ExpertCheckpoint.open(tmp_path).check()


APART = {
    "qwen3_vl_moe": "model.language_model.layers.{}.mlp.experts.{}.",
    "gemma4": "model.language_model.layers.{}.experts.{}.",
    "llama4": "language_model.model.layers.{}.feed_forward.experts.{}.",
}


@pytest.mark.parametrize("name", ["awq", "int4", "fp8_channel", "nvfp4"])
@pytest.mark.parametrize("family", APART)
def test_experts_that_a_tool_took_apart_are_read(tmp_path: Path, family: str, name: str) -> None:
    made = quantized(tmp_path, FORMATS[name])
    text = {**TEXT, **made.config, "model_type": f"{family}_text"}
    text |= {"top_k_experts": 2, "hidden_activation": "gelu_pytorch_tanh", "decoder_sparse_step": 1}
    made.config = {"model_type": family, "text_config": text, "quantization_config": FORMATS[name].config}
    for layer in range(LAYERS):
        for expert in range(E):
            old, new = stem(layer, expert), APART[family].format(layer, expert)
            made.tensors = {tensor.replace(old, new): value for tensor, value in made.tensors.items()}
    if family == "llama4":
        text["intermediate_size"] = I
    checkpoint = ExpertCheckpoint.open(made.write())
    checkpoint.check()
    assert all(checkpoint.owns(tensor) for tensor in made.tensors)
    gate, up, down = (made.values[stem(1, 2) + n] for n in ("gate_proj", "up_proj", "down_proj"))
    read = checkpoint.read_expert(1, 2, torch.float32)
    np.testing.assert_allclose(read.w13_2ID.double().numpy(), np.concatenate([gate, up]), rtol=2**-23)
    np.testing.assert_allclose(read.w2_DI.double().numpy(), down, rtol=2**-23)


def config_of(family: str, settings: dict[str, Any]) -> ModelConfig:
    values = {**TEXT, "model_type": family, "num_experts": E, "moe_intermediate_size": I, "vocab_size": 64}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "decoder_sparse_step": 1}
    values["quantization_config"] = settings
    return ModelConfig.of_values(values, Path("config.json"))


@pytest.mark.parametrize(
    ("family", "settings", "kept"),
    [
        ("llama4_text", FORMATS["fp8_modelopt"].config, False),
        ("llama4_text", FORMATS["fp8_tensor"].config, True),
        ("qwen3_vl_moe_text", {"quant_method": "fp8", "weight_block_size": [128, 128]}, False),
        ("qwen3_vl_moe_text", FORMATS["int4"].config, True),
        ("qwen3_moe", {"quant_method": "fp8", "weight_block_size": [128, 128]}, True),
    ],
)
def test_what_becomes_floats_is_said_and_counted(family: str, settings: dict[str, Any], kept: bool) -> None:
    """Squares and ModelOpt's FP8 are in transposed tensors, of which no kernel keeps FP8; other formats are apart."""
    config = config_of(family, settings)
    found, facts = verdict_on(config), facts_of(config, family)
    assert found.state is not State.refused
    assert ("which kernels for GPUs keep as it is" in found.text) == kept
    assert facts.stored.kept == kept
    assert any("no kernel of a shard keeps" in note for note in facts.notes) != kept
    assert (facts.expert_bytes == 2 * 3 * D * I) != kept
