"""A layer for multi-token prediction that is served: its bytes from config.json and from headers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from experts.checkpoint import CheckpointError, ExpertCheckpoint
from experts.checkpoint.hf_config import ModelConfig
from experts.checkpoint.sizes.architecture import facts_of
from experts.checkpoint.sizes.find import find_facts
from experts.checkpoint.sizes.known_models import known_model
from experts.checkpoint.sizes.mtp import with_parts
from placement.sizing.memory import engine_memory, router_memory, shard_memory
from tests.support.mtp_checkpoint import make_mtp_checkpoint
from tests.support.random_checkpoints import make_checkpoint


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3", "glm4_moe_lite"])
def test_its_bytes_are_those_of_the_files(family: str, tmp_path: Path) -> None:
    folder = make_mtp_checkpoint(family, tmp_path)
    read, _ = find_facts(str(folder), mtp=True)
    assert read.basis == "headers"
    checkpoint = ExpertCheckpoint.open(folder, mtp=True)
    assert read.expert_layers == checkpoint.spec.num_layers == read.moe_layers + 1
    assert 2 * read.expert_bytes == checkpoint.expert_bytes, "stored in float32, held in 16 bits"

    tensors = load_file(folder / "model.safetensors")
    prefix = f"model.layers.{read.num_layers}."
    of_layer = {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
    copies = ("embed_tokens.weight", "shared_head.head.weight")
    dense = sum(t.numel() for name, t in of_layer.items() if ".experts." not in name and name not in copies)
    assert read.mtp_router_bytes == 2 * dense
    assert facts_of(ModelConfig(folder), family, mtp=True).mtp_router_bytes == 2 * dense


def test_it_is_one_more_layer_of_shards_and_of_the_kv_cache(tmp_path: Path) -> None:
    without, _ = find_facts(str(make_mtp_checkpoint("glm4_moe", tmp_path)))
    served, _ = find_facts(str(tmp_path), mtp=True)
    load = {"chunk": 512, "sequences": 4, "context": 4096}

    def lines(facts, memory, **asked) -> dict[str, float]:  # type: ignore[no-untyped-def]
        return {line.what: line.nbytes for line in memory(facts, **asked).lines}

    for memory, asked, experts in (
        (shard_memory, {"slots": 3, "pairs": 2}, "expert slots"),
        (engine_memory, {"kv_value_bytes": 2.0, "gpus": 2, **load}, "experts"),
    ):
        fewer, more = lines(without, memory, **asked), lines(served, memory, **asked)
        assert more[experts] * without.moe_layers == fewer[experts] * (without.moe_layers + 1)
    asked = {"kv_value_bytes": 2.0, "shards": 2, "workers": 2, **load}
    fewer, more = lines(without, router_memory, **asked), lines(served, router_memory, **asked)
    assert more["KV cache"] * without.num_layers == pytest.approx(fewer["KV cache"] * (without.num_layers + 1))
    assert served.mtp_router_bytes is not None
    assert more.pop("multi-token prediction") == served.mtp_router_bytes / 2
    assert {**more, "KV cache": 0} == {**fewer, "KV cache": 0}


def test_a_layer_that_is_not_quantized_as_the_others_has_all_experts_held_in_16_bits(tmp_path: Path) -> None:
    known = known_model("deepseek-v3")
    assert known is not None
    facts = known.facts(mtp=True)
    layer = facts.weight_bytes("experts") // facts.moe_layers
    parts = [("routed experts", "experts", facts.moe_layers * layer), ("multi-token prediction", "unused", 5)]
    same = with_parts(facts, (*parts, ("its routed experts", "unused", layer)))  # type: ignore[arg-type]
    assert (same.stored.kept, same.mtp_router_bytes) == (True, 5)
    other = with_parts(facts, (*parts, ("its routed experts", "unused", 2 * layer)))  # type: ignore[arg-type]
    assert other.expert_bytes == 2 * facts.expert_parameters
    assert "stored otherwise than the others" in other.notes[-1]


def test_a_model_without_such_a_layer_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3_moe", tmp_path / "other")
    with pytest.raises(CheckpointError, match="where the experts of an MTP layer of 'qwen3_moe' are is not known"):
        find_facts(str(folder), mtp=True)
    lost = make_mtp_checkpoint("glm4_moe", tmp_path / "lost")
    layers = json.loads((lost / "config.json").read_text())["num_hidden_layers"]
    tensors = load_file(lost / "model.safetensors")
    kept = {name: each for name, each in tensors.items() if f"layers.{layers}." not in name}
    save_file(kept, lost / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="names an MTP layer, which the files lack"):
        find_facts(str(lost), mtp=True)
