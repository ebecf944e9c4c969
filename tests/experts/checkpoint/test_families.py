"""Every naming scheme returns the experts that were written under the hub's names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experts.checkpoint import CheckpointError, ExpertCheckpoint
from experts.checkpoint.families import FAMILIES
from experts.model.spec import ActivationSpec
from tests.support.expected_experts import D, E, Expected, I
from tests.support.hub_names import MAKERS, write

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_experts(checkpoint: ExpertCheckpoint, expected: Expected, dtype: torch.dtype) -> None:
    assert set(expected.experts) == {(i, e) for i in checkpoint.spec.layer_ids for e in range(E)}
    for layer, layer_id in enumerate(checkpoint.spec.layer_ids):
        for expert in range(E):
            got = checkpoint.read_expert(layer, expert, dtype)
            gate, up, down = expected.experts[layer_id, expert]
            assert torch.equal(got.w13_2ID, torch.cat([gate, up]).to(dtype))
            assert torch.equal(got.w2_DI, down.to(dtype))
            assert got.w13_2ID.is_contiguous()
            assert got.w2_DI.is_contiguous()
            if expected.biases:
                assert got.b13_2I is not None
                assert got.b2_D is not None
                assert torch.equal(got.b13_2I, expected.biases[layer_id, expert][0].to(dtype))
                assert torch.equal(got.b2_D, expected.biases[layer_id, expert][1].to(dtype))
            else:
                assert got.b13_2I is None
                assert got.b2_D is None


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("num_files", [1, 3])
def test_reads_what_the_hub_has(tmp_path: Path, name: str, num_files: int) -> None:
    expected = MAKERS[name]()
    checkpoint = ExpertCheckpoint.open(write(tmp_path, expected.config, expected.tensors, num_files))
    checkpoint.check()
    spec = checkpoint.spec
    assert (spec.num_experts, spec.hidden_size, spec.intermediate_size) == (E, D, I)
    assert spec.num_layers == len(spec.layer_ids)
    assert spec.has_bias == bool(expected.biases)
    values = 3 * D * I + (2 * I + D if expected.biases else 0)
    assert checkpoint.expert_bytes == 4 * values == checkpoint.read_expert(0, 0, torch.float32).nbytes
    for dtype in DTYPES:
        assert_experts(checkpoint, expected, dtype)


@pytest.mark.parametrize("name", MAKERS)
def test_owns_routed_experts_and_nothing_else(tmp_path: Path, name: str) -> None:
    expected = MAKERS[name]()
    checkpoint = ExpertCheckpoint.open(write(tmp_path, expected.config, expected.tensors))
    for tensor in expected.tensors:
        is_expert = any(part in tensor for part in ("experts.", "_moe.input_linear.", "_moe.output_linear.", ".moe."))
        is_expert = is_expert and "shared_experts" not in tensor
        assert checkpoint.owns(tensor) == is_expert, tensor
    assert not checkpoint.owns("model.embed_tokens.weight")


def test_every_entry_is_tested() -> None:
    made = {MAKERS[name]().config.get("model_type") for name in MAKERS}
    untested = {
        "qwen3_next",
        "qwen3_vl_moe_text",
        "glm4_moe_lite",
        "glm4v_moe_text",
    }  # share an entry with a type that has a maker
    assert {t for family in FAMILIES for t in family.model_types} == made | untested


def test_spec_of_gpt_oss_and_llama4(tmp_path: Path) -> None:
    for name, activation, weight_on_input in (
        ("gpt_oss", ActivationSpec("swigluoai", 1.702, 7.0), False),
        ("llama4", ActivationSpec("silu"), True),
    ):
        made = MAKERS[name]()
        spec = ExpertCheckpoint.open(write(tmp_path / name, made.config, made.tensors)).spec
        assert (spec.activation, spec.weight_on_input) == (activation, weight_on_input)


def test_dtypes_are_converted_from_bfloat16(tmp_path: Path) -> None:
    made = MAKERS["mixtral"]()
    stored = {name: tensor.to(torch.bfloat16) for name, tensor in made.tensors.items()}
    made.experts = {k: tuple(w.to(torch.bfloat16).float() for w in v) for k, v in made.experts.items()}
    checkpoint = ExpertCheckpoint.open(write(tmp_path, made.config, stored))
    assert checkpoint.expert_bytes == 2 * 3 * D * I
    for dtype in DTYPES:
        assert_experts(checkpoint, made, dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is unknown; expected one of .*mixtral"),
        ({"model_type": None}, "model_type is None, expected a string"),
        ({"num_local_experts": None}, "expected one of num_experts, num_local_experts, n_routed_experts, found none"),
        ({"num_local_experts": 0}, "num_local_experts is 0, expected a positive integer"),
        ({"num_experts_per_tok": 4}, "top-4 of 3 experts"),
        ({"hidden_act": "relu"}, "activation 'relu' is not supported; expected one of .*silu"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization awq with bits None is not supported"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantization hqq is not supported; expected none, awq"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors is not supported"),
    ],
)
def test_refuses_by_name(tmp_path: Path, change: dict[str, object], message: str) -> None:
    made = MAKERS["mixtral"]()
    write(tmp_path, {**made.config, **change}, made.tensors)
    with pytest.raises(CheckpointError, match=message):
        ExpertCheckpoint.open(tmp_path)


def test_a_model_without_routed_layers_is_refused(tmp_path: Path) -> None:
    made = MAKERS["qwen3_moe"]()
    write(tmp_path, {**made.config, "mlp_only_layers": [0, 1, 2, 3]}, made.tensors)
    with pytest.raises(CheckpointError, match="no layer of this qwen3_moe has routed experts"):
        ExpertCheckpoint.open(tmp_path)
