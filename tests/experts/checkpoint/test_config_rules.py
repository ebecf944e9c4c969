"""What config.json says, in each of its spellings, and what of it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experts.checkpoint import CheckpointError
from experts.checkpoint.families import (
    activation_named,
    activation_of,
    after_dense_layers,
    every_layer,
    every_sparse_step,
    family_of,
    gpt_oss_activation,
    interleaved_layers,
)
from experts.checkpoint.hf_config import ModelConfig
from experts.checkpoint.quantization.blocks import Mxfp4
from experts.checkpoint.quantization.floats import Nvfp4
from experts.checkpoint.quantization.stacked import StackedNvfp4
from experts.model.spec import ActivationSpec


def config(folder: Path, **values: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral", "num_hidden_layers": 6, **values}))
    return ModelConfig(folder)


# --- the file -----------------------------------------------------------------------------------------------------


def test_a_nested_language_model_comes_before_the_whole(tmp_path: Path) -> None:
    found = config(tmp_path, hidden_size=1, vision=2, text_config={"hidden_size": 3, "model_type": "olmoe"})
    assert (found.int_of("hidden_size"), found.int_of("vision"), found.model_type) == (3, 2, "olmoe")
    assert config(tmp_path, text_config="a name").get("text_config") == "a name"
    assert found.path == tmp_path / "config.json"


def test_a_dot_descends_and_null_is_absent(tmp_path: Path) -> None:
    found = config(tmp_path, ffn={"top": {"k": 4}, "none": None}, flat=7)
    assert (found.get("ffn.top.k"), found.get("flat")) == (4, 7)
    for absent in ("ffn.none", "ffn.other.k", "flat.k", "ffn.top.k.more", "nothing"):
        assert found.get(absent) is None
        assert found.get(absent, 5) == 5


def test_the_first_key_that_is_there_counts(tmp_path: Path) -> None:
    found = config(tmp_path, second=2, third=3, null=None, one=1)
    assert found.int_of("first", "null", "second", "third") == 2
    assert found.int_of("one") == 1
    assert config(tmp_path, each=[3, 3]).int_of("each") == 3, "Hunyuan says it of each layer"
    with pytest.raises(CheckpointError, match=r"config\.json: expected one of first, null, found none"):
        found.int_of("first", "null")


@pytest.mark.parametrize("value", [0, -1, 1.5, "3", True, [], [3, 4], ["3"], [[3]]])
def test_a_number_that_is_none_is_named(tmp_path: Path, value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"size is .*, expected a positive integer"):
        config(tmp_path, size=value, other=3).int_of("size", "other")


def test_strings(tmp_path: Path) -> None:
    found = config(tmp_path, act="gelu", wrong=3)
    assert (found.str_of("act"), found.str_of("act", "silu"), found.str_of("none", "silu")) == ("gelu", "gelu", "silu")
    for key, text in (("wrong", "wrong is 3, expected a string"), ("none", "none is None, expected a string")):
        with pytest.raises(CheckpointError, match=text):
            found.str_of(key)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read as JSON: Expecting"), ("[1]", "expected a JSON object, found list"), ("3", "found int")],
)
def test_a_file_that_is_no_object_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        ModelConfig(tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read as JSON: .*directory"):
        ModelConfig(tmp_path)


# --- formats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_quantization_is_found_wherever_it_stands(tmp_path: Path, key: str) -> None:
    settings = {"quant_method": "mxfp4"}
    assert config(tmp_path, **{key: settings}).scheme() == Mxfp4()
    assert config(tmp_path, text_config={key: settings}).scheme() == Mxfp4()
    assert config(tmp_path, **{key: "mxfp4"}).scheme() == Mxfp4()


def test_a_quantization_in_a_file_of_its_own_is_found(tmp_path: Path) -> None:
    """As older versions of ModelOpt write it; config.json goes first."""
    config(tmp_path)
    beside = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(beside))
    assert ModelConfig(tmp_path).scheme() == Nvfp4(False, StackedNvfp4())
    assert config(tmp_path, quantization_config={"quant_method": "mxfp4"}).scheme() == Mxfp4()
    (tmp_path / "hf_quant_config.json").write_text("{")
    assert config(tmp_path, quantization_config={"quant_method": "mxfp4"}).scheme() == Mxfp4()
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json: cannot be read as JSON"):
        config(tmp_path)


def test_plain_floats_have_no_format(tmp_path: Path) -> None:
    assert config(tmp_path).scheme() is None
    assert config(tmp_path, quantization_config=None).scheme() is None
    assert not config(tmp_path).quantizes_dense


# --- which layers have experts ------------------------------------------------------------------------------------


def test_every_layer_by_either_name(tmp_path: Path) -> None:
    assert list(every_layer(config(tmp_path))) == [0, 1, 2, 3, 4, 5]
    assert list(every_layer(config(tmp_path, num_hidden_layers=None, n_layers=2))) == [0, 1]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"decoder_sparse_step": 2}, [1, 3, 5]),
        ({"decoder_sparse_step": 3}, [2, 5]),
        ({"decoder_sparse_step": 0}, []),
        ({"mlp_only_layers": [0, 4]}, [1, 2, 3, 5]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [1, 5]),
    ],
)
def test_every_sparse_step(tmp_path: Path, values: dict[str, Any], expected: list[int]) -> None:
    assert list(every_sparse_step(config(tmp_path, **values))) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"first_k_dense_replace": 2}, [2, 3, 4, 5]),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, [2, 4]),
        ({"moe_layer_freq": 4}, [0, 4]),
        ({"mlp_layer_types": ["dense", "sparse", "sparse", "dense", "dense", "sparse"]}, [1, 2, 5]),
        ({"mlp_layer_types": ["dense"] * 5 + ["sparse"], "first_k_dense_replace": 1}, [5]),
    ],
)
def test_after_dense_layers(tmp_path: Path, values: dict[str, Any], expected: list[int]) -> None:
    assert list(after_dense_layers(config(tmp_path, **values))) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"interleave_moe_layer_step": 2}, [1, 3, 5]),
        ({"interleave_moe_layer_step": 0}, []),
        ({"moe_layers": [4, 1]}, [1, 4]),
        ({"moe_layers": [], "interleave_moe_layer_step": 2}, []),
    ],
)
def test_interleaved_layers(tmp_path: Path, values: dict[str, Any], expected: list[int]) -> None:
    assert list(interleaved_layers(config(tmp_path, **values))) == expected


# --- activations and families -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
    ],
)
def test_activations_by_the_names_that_transformers_gives_them(tmp_path: Path, name: str, kind: Any) -> None:
    assert activation_named(name) == ActivationSpec(kind)
    for model_type in ("mixtral", "olmoe", "llama4"):
        found = config(tmp_path, model_type=model_type, hidden_act=name)
        assert activation_of(family_of(found), found) == ActivationSpec(kind)
    dbrx = config(tmp_path, model_type="dbrx", ffn_config={"ffn_act_fn": {"name": name}}, hidden_act="relu")
    assert activation_of(family_of(dbrx), dbrx) == ActivationSpec(kind)


def test_what_nobody_named_is_silu(tmp_path: Path) -> None:
    for model_type in ("mixtral", "dbrx", "deepseek_v3"):
        found = config(tmp_path, model_type=model_type)
        assert activation_of(family_of(found), found) == ActivationSpec("silu")


def test_an_unknown_activation_is_refused_with_the_known_ones() -> None:
    known = r"\['gelu', 'gelu_new', 'gelu_pytorch_tanh', 'silu', 'swish'\]"
    with pytest.raises(CheckpointError, match=f"activation 'relu' is not supported; expected one of {known}"):
        activation_named("relu")


def test_the_clamp_of_gpt_oss_is_in_its_configuration(tmp_path: Path) -> None:
    assert gpt_oss_activation(config(tmp_path)) == ActivationSpec("swigluoai", 1.702, 7.0)
    found = config(tmp_path, model_type="gpt_oss", swiglu_alpha=1.5, swiglu_limit=6.0)
    assert activation_of(family_of(found), found) == ActivationSpec("swigluoai", 1.5, 6.0)


def test_an_unknown_family_is_refused_with_the_known_ones_in_order(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"model_type 'llama' is unknown; expected one of \['afmoe', 'axk1', 'bailing_hybrid', 'bailing_moe'",
    ):
        family_of(config(tmp_path, model_type="llama"))


def test_where_each_family_keeps_its_numbers(tmp_path: Path) -> None:
    found = {
        model_type: (one.num_experts, one.top_k, one.hidden_size, one.intermediate_size, one.weight_on_input)
        for model_type in ("qwen3_moe", "mixtral", "gpt_oss", "llama4", "dbrx")
        for one in [family_of(config(tmp_path, model_type=model_type))]
    }
    counts = ("num_experts", "num_local_experts", "n_routed_experts")
    usual = (counts, ("num_experts_per_tok",), ("hidden_size",))
    assert found == {
        "qwen3_moe": (*usual, ("moe_intermediate_size",), False),
        "mixtral": (*usual, ("intermediate_size",), False),
        "gpt_oss": (*usual, ("intermediate_size",), False),
        "llama4": (*usual, ("intermediate_size",), True),
        "dbrx": (
            ("ffn_config.moe_num_experts",),
            ("ffn_config.moe_top_k",),
            ("d_model",),
            ("ffn_config.ffn_hidden_size",),
            False,
        ),
    }
