"""The vLLM functions that our GPU kernels use exist, with the parameters that we name; read from the installed source.

vLLM's CPU build includes the source, though it cannot run it. A failure means that this version of vLLM moved
something: change experts/kernels/vllm/triton.py or quantized.py.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

FUSED = "model_executor/layers/fused_moe"
# (file, function): parameters; those passed by position come first, in order
TAKEN = {
    (f"{FUSED}/fused_moe.py", "fused_experts"): [
        "hidden_states", "w1", "w2", "topk_weights", "topk_ids", "activation", "quant_config",
    ],
    (f"{FUSED}/config.py", "fp8_w8a8_moe_quant_config"): ["w1_scale", "w2_scale", "block_shape"],
    (f"{FUSED}/config.py", "int4_w4a16_moe_quant_config"): ["w1_scale", "w2_scale", "block_shape"],
    (f"{FUSED}/config.py", "biased_moe_quant_config"): ["w1_bias", "w2_bias"],
    (f"{FUSED}/experts/marlin_moe.py", "fused_marlin_moe"): [
        "hidden_states", "w1", "w2", "bias1", "bias2", "w1_scale", "w2_scale", "topk_weights", "topk_ids",
        "quant_type_id", "activation",
    ],
    ("model_executor/layers/quantization/utils/marlin_utils_fp4.py", "prepare_moe_mxfp4_layer_for_marlin"): [
        "layer", "w13", "w2", "w13_scale", "w2_scale", "w13_bias", "w2_bias",
    ],
}  # fmt: skip
BY_POSITION = {"fused_experts": 5, "fused_marlin_moe": 9, "prepare_moe_mxfp4_layer_for_marlin": 7}


@pytest.fixture(scope="module")
def source() -> Path:
    """vLLM's folder, found without importing it."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vllm is not installed")
    return Path(spec.origin).parent


@pytest.mark.parametrize(("file", "function"), TAKEN, ids=lambda value: Path(value).stem)
def test_function(source: Path, file: str, function: str) -> None:
    tree = ast.parse((source / file).read_text())
    found = next((n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function), None)
    assert found is not None, f"{file} has no {function}"
    names = [argument.arg for argument in found.args.args]
    wanted = TAKEN[file, function]
    by_position = BY_POSITION.get(function, 2)
    assert names[:by_position] == wanted[:by_position]
    assert set(wanted) <= set(names)
    required = len(names) - len(found.args.defaults)
    assert set(names[:required]) <= set(wanted)


def test_activations(source: Path) -> None:
    text = (source / FUSED / "activation.py").read_text()
    tree = next(n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == "MoEActivation")
    values = {n.value.value for n in tree.body if isinstance(n, ast.Assign) and isinstance(n.value, ast.Constant)}
    assert {"silu", "gelu", "gelu_tanh", "swigluoai"} <= values
    # Which rows are gates; our weights are put into this order.
    assert "SWIGLUOAI expects gate/up *interleaved*" in text


def test_fp4_has_its_name(source: Path) -> None:
    assert "float4_e2m1f" in (source / "scalar_type.py").read_text()
