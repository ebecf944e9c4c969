"""Bytes from config.json alone are those of transformers' own modules, and of the files that they write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experts.checkpoint import CheckpointError, ExpertCheckpoint
from experts.checkpoint.header import read_header
from experts.checkpoint.hf_config import ModelConfig
from experts.checkpoint.sizes.architecture import facts_of
from experts.checkpoint.sizes.find import find_facts
from placement.sizing.model import ModelFacts
from tests.support.family_configs import SIZED_FAMILIES
from tests.support.random_checkpoints import make_checkpoint

TINY_MOE = Path(__file__).parents[4] / "examples" / "tiny-moe"


def stored_bytes(folder: Path) -> int:
    return sum(entry.nbytes for path in folder.glob("*.safetensors") for entry in read_header(path).values())


def by_part(facts: ModelFacts) -> dict[str, int]:
    return {f"{side} {part}": nbytes for part, side, nbytes in facts.parts()}


@pytest.mark.parametrize("family", [*SIZED_FAMILIES, "minimax_m2", "glm_moe_dsa", "llama4_text", "dbrx"])
def test_every_byte_of_a_real_module_is_known_from_its_config(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path)
    computed = facts_of(ModelConfig(folder), family)
    assert computed.basis == "config"
    assert computed.weight_bytes("router") + computed.weight_bytes("experts") == stored_bytes(folder)

    read, path = find_facts(str(folder))
    assert (read.basis, path) == ("headers", str(folder))
    assert by_part(read) == by_part(computed), "each part from headers is the part from config.json"

    checkpoint = ExpertCheckpoint.open(folder)
    assert 2 * read.expert_bytes == checkpoint.expert_bytes, "stored in float32, held in 16 bits"
    assert read.moe_layers == checkpoint.spec.num_layers


@pytest.mark.parametrize("kind", ["ernie4_5_moe", "granitemoe"])
def test_what_is_served_but_not_sized_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(CheckpointError, match=f"'{kind}' is served, but its size is not known from config.json"):
        facts_of(ModelConfig(tmp_path), kind)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_tied_embeddings_are_stored_once(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path, tie_word_embeddings=True)
    facts = facts_of(ModelConfig(folder), family)
    assert facts.weight_bytes("router") + facts.weight_bytes("experts") == stored_bytes(folder)


def test_the_tiny_model_of_the_repository() -> None:
    facts, _ = find_facts(str(TINY_MOE))
    assert facts.basis == "headers"
    assert facts.weight_bytes("router") + facts.weight_bytes("experts") == stored_bytes(TINY_MOE)
    assert 2 * facts.parameters() == stored_bytes(TINY_MOE) == facts.held_bytes("router") + facts.held_bytes("experts")


def test_a_folder_with_config_json_alone_is_sized_from_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((TINY_MOE / "config.json").read_text())
    facts, _ = find_facts(str(tmp_path))
    assert facts.basis == "config"
    assert "no file of weights" in facts.notes[-1]
    read = by_part(find_facts(str(TINY_MOE))[0])
    assert by_part(facts) == {part: 2 * nbytes for part, nbytes in read.items()}, (
        "it says float32, the file has bfloat16"
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is unknown"),
        ({"layer_types": ["linear_attention"] * 4}, "linear attention"),
        ({"layer_types": ["odd_attention"] * 4}, "odd_attention"),
        ({"dtype": "int7"}, "dtype is 'int7'"),
        ({"vocab_size": None}, "expected one of vocab_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a positive integer"),
        ({"mlp_only_layers": [0, 1, 2, 3]}, "no layer of this qwen3_moe has routed experts"),
        ({"quantization_config": {"quant_method": "hqq"}}, "hqq is not supported"),
    ],
)
def test_what_cannot_be_sized_is_refused_by_name(change: dict[str, object], told: str, tmp_path: Path) -> None:
    values = json.loads((TINY_MOE / "config.json").read_text()) | change
    with pytest.raises(CheckpointError, match=told):
        facts_of(ModelConfig.of_values(values, tmp_path / "config.json"), "odd")


def test_a_name_that_is_nothing_is_refused_with_what_is_known() -> None:
    with pytest.raises(CheckpointError, match=r"no folder, no hub id .* mixtral-8x7b"):
        find_facts("mixtral-9x9b")
