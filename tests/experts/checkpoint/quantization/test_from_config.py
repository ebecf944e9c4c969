"""What config.json says of a quantization: the format it names, or what is not supported and what is expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experts.checkpoint import CheckpointError, ExpertCheckpoint
from experts.checkpoint.quantization.awq import Awq
from experts.checkpoint.quantization.blocks import Fp8Block, Mxfp4
from experts.checkpoint.quantization.floats import Fp8Channel, Fp8Tensor, Nvfp4
from experts.checkpoint.quantization.from_config import scheme_of, spares_attention
from experts.checkpoint.quantization.gptq import Gptq
from experts.checkpoint.quantization.integers import Int8, PackedIntegers
from experts.checkpoint.quantization.scheme import Scheme
from experts.checkpoint.quantization.stacked import StackedFp8, StackedNvfp4
from experts.checkpoint.sources.opening import open_source
from tests.support.quantized_formats import AWQ, GPTQ, compressed

CONFIG = Path("model/config.json")
INT4 = ("pack-quantized", "int", 4, "group")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"quant_method": "mxfp4"}, Mxfp4()),
        ("mxfp4", Mxfp4()),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, Fp8Block()),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, Fp8Tensor()),
        (AWQ, Awq(32)),
        ({**AWQ, "version": "GEMM", "group_size": -1}, Awq(None)),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "zero_point": True}, Awq(128)),
        (GPTQ, Gptq(4, 32)),
        ({**GPTQ, "bits": 8, "group_size": 128, "desc_act": True}, Gptq(8, 128, ordered=True)),
        ({**GPTQ, "checkpoint_format": "gptq_v2"}, Gptq(4, 32, version=2)),
        ({**GPTQ, "group_size": -1, "desc_act": True}, Gptq(4, None)),
        ({**GPTQ, "dynamic": {r"-:.*\.shared_expert\..*": {}}}, Gptq(4, 32)),
        (compressed(*INT4, group_size=32), PackedIntegers(4, 32)),
        (compressed(*INT4, group_size=128, actorder="static"), PackedIntegers(4, 128)),
        (compressed(*INT4, group_size=128, actorder="weight"), PackedIntegers(4, 128)),
        (compressed(*INT4, group_size=64, symmetric=False), PackedIntegers(4, 64, symmetric=False)),
        (compressed(*INT4, group_size=32, actorder="group"), PackedIntegers(4, 32, ordered=True)),
        (compressed("pack-quantized", "int", 8, "channel"), PackedIntegers(8, None)),
        (compressed("int-quantized", "int", 8, "channel"), Int8(per_row=True)),
        (compressed("int-quantized", "int", 8, "tensor"), Int8(per_row=False)),
        (compressed("naive-quantized", "float", 8, "tensor"), Fp8Tensor()),
        (compressed("float-quantized", "float", 8, "channel"), Fp8Channel()),
        (compressed("float-quantized", "float", 8, "block", block_structure=[128, 128]), Fp8Block("_scale")),
        (compressed("nvfp4-pack-quantized", "float", 4, "tensor_group", group_size=16), Nvfp4(divides=True)),
        (compressed("mxfp4-pack-quantized", "float", 4, "group", group_size=32), Mxfp4(packed=True)),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, Fp8Tensor(StackedFp8())),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, Nvfp4(False, StackedNvfp4())),
        ({"quant_method": "modelopt_fp4", "quantization": {"quant_algo": "nvfp4"}}, Nvfp4(False, StackedNvfp4())),
    ],
)
def test_formats_that_are_read(settings: Any, expected: Scheme) -> None:
    found = scheme_of(settings, CONFIG)
    assert found == expected
    assert type(found) is type(expected)
    assert all(isinstance(told, str) and told for told in (found.name, found.text))


def groups(*weights: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    known = {f"group_{index}": {"weights": each} for index, each in enumerate(weights)}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": known, **more}


W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
W8 = {**W4, "num_bits": 8}


def test_groups_that_say_the_same_are_one() -> None:
    assert scheme_of(groups(W4, W4), CONFIG) == PackedIntegers(4, 32)
    of_group = {"format": "int-quantized", "weights": {**W8, "strategy": "channel"}}
    assert scheme_of(groups(format="mixed-precision", config_groups={"a": of_group}), CONFIG) == Int8(per_row=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "hqq",
            "quantization hqq is not supported; expected none, awq, gptq, compressed-tensors, fp8, mxfp4 or modelopt",
        ),
        ({"bits": 4}, "quantization None is not supported"),
        ({"quant_method": ["awq"]}, r"quantization \['awq'\] is not supported"),
        ({"quant_method": "fbgemm_fp8"}, "quantization fbgemm_fp8 is not supported"),
        ({"quant_method": "bitsandbytes"}, "quantization bitsandbytes is not supported"),
        ({"quant_method": "gguf"}, "GGUF is not supported: experts are read from safetensors"),
        ({"quant_method": "fp8", "weight_block_size": [64, 128]}, r"weight_block_size \[64, 128\] is not supported"),
        ("awq", "quantization awq with bits None is not supported; expected 4"),
        ({**AWQ, "bits": 8}, "quantization awq with bits 8 is not supported; expected 4"),
        ({**AWQ, "version": "gemv"}, "awq with version 'gemv' is not supported; expected 'gemm'"),
        ({**AWQ, "zero_point": False}, "awq with zero_point False is not supported; expected True"),
        ({**AWQ, "group_size": 100}, "awq with group_size 100 is not supported; expected -1 or 16 or 32"),
        ({**GPTQ, "bits": 3}, "gptq with bits 3 is not supported; expected 4 or 8"),
        ({**GPTQ, "bits": True}, "gptq with bits True is not supported"),
        ({**GPTQ, "sym": False}, "gptq with sym False is not supported; expected True"),
        ({**GPTQ, "desc_act": None}, "gptq with desc_act None is not supported; expected True or False"),
        ({**GPTQ, "group_size": None}, "gptq with group_size None is not supported"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "gptq with checkpoint_format 'marlin' is not supported"),
        ({**GPTQ, "is_marlin_format": True}, "gptq with is_marlin_format True is not supported"),
        ({**GPTQ, "dynamic": {r"+:.*\.31\..*": {"bits": 8}}}, r"gptq with dynamic '\+:.* expected one precision"),
        (groups(), "one group of weights; found 0 groups of settings"),
        ({**groups(), "config_groups": [W4]}, "found 0 groups"),
        (groups(None), r"found 1 groups of settings \(group_0: no weights\)"),
        (groups(W4, W8), r"found 2 groups of settings \(group_0: int4 by group, group_1: int8 by group\)"),
        (
            groups(W4, format="dense"),
            "'format': 'dense' of 'type': 'int', 'num_bits': 4; expected pack-quantized of int4",
        ),
        (groups({**W4, "num_bits": 3}), "'num_bits': 3; expected"),
        (groups({**W4, "type": "float"}), "'type': 'float'"),
        (groups({**W4, "strategy": "block"}), "with strategy 'block' is not supported; expected 'group' or 'channel'"),
        (groups({**W4, "actorder": "dynamic"}), "with actorder 'dynamic' is not supported"),
        (groups({**W4, "group_size": 24}), "with group_size 24 is not supported; expected 16 or 32"),
        (groups({**W4, "group_size": None}), "with group_size None is not supported"),
        (groups(W4, sparsity_config={"format": "sparse-24-bitmask"}), "with sparsity_config is not supported; found"),
        (groups(W4, transform_config={"config_groups": {"u": {}}}), "with transform_config is not supported; found"),
        (compressed("int-quantized", "int", 8, "group"), "with strategy 'group' is not supported; expected 'channel'"),
        (compressed("int-quantized", "int", 8, "channel", symmetric=False), "with symmetric False is not supported"),
        (compressed("float-quantized", "float", 8, "block", block_structure=[1, 128]), r"block_structure \[1, 128\]"),
        (compressed("nvfp4-pack-quantized", "float", 4, "tensor_group", group_size=32), "with group_size 32"),
        (compressed("mxfp4-pack-quantized", "float", 4, "group", group_size=16), "with group_size 16"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "with quant_algo 'MIXED_PRECISION' is not"),
        ({"quant_method": "modelopt"}, "with quant_algo 'NONE' is not supported; expected 'FP8' or 'NVFP4'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}, "with group_size 32 is not supported"),
    ],
)
def test_what_is_not_supported_is_told_with_what_is_expected(settings: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^model/config\.json: .*{message}"):
        scheme_of(settings, CONFIG)


def test_dense_layers_are_quantized_unless_the_settings_spare_them() -> None:
    assert spares_attention("mxfp4")
    assert spares_attention(groups(W4)), "as Kimi K2 has it, whose files name what is ignored"
    assert not spares_attention(AWQ)
    assert spares_attention({**AWQ, "modules_to_not_convert": ["model.layers.0.self_attn"]})
    assert not spares_attention({**AWQ, "modules_to_not_convert": None})
    assert spares_attention({"quant_method": "modelopt", "quantization": {"exclude_modules": ["*self_attn*"]}})


# --- GGUF ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["models/qwen3-30b-a3b-q4_k_m.gguf", "org/model-GGUF/Model.Q8_0.GGUF", Path("a.gguf")])
def test_a_gguf_file_is_refused_by_name(name: str | Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{name}: GGUF is not supported: experts are read from safetensors"):
        open_source(name)


def test_a_folder_of_gguf_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00002.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=f"{tmp_path}: GGUF is not supported"):
        ExpertCheckpoint.open(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    with pytest.raises(CheckpointError, match=f"{tmp_path}: GGUF is not supported"):
        ExpertCheckpoint.open(tmp_path)


def test_gguf_beside_safetensors_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_type"}))
    with pytest.raises(CheckpointError, match="model_type 'no_such_type' is unknown"):
        ExpertCheckpoint.open(tmp_path)
