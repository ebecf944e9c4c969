"""Headers, here and on a hub: parts and sides by name, and what is not loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from experts.checkpoint import CheckpointError
from experts.checkpoint.hf_config import ModelConfig
from experts.checkpoint.sizes.from_headers import parts_of_folder, sort_parts
from tests.support.fake_hub import fake_hub
from tests.support.hub_names import MAKERS, write
from tests.support.random_checkpoints import make_checkpoint


def is_routed(name: str) -> bool:
    """Granite's and Step3's have no "experts" in their names."""
    others = ("block_sparse_moe.input_linear.", "block_sparse_moe.output_linear.", ".moe.")
    return (".experts." in name and "shared" not in name) or any(part in name for part in others)


@pytest.mark.parametrize("name", MAKERS)
def test_experts_of_every_naming_scheme_are_found(name: str, tmp_path: Path) -> None:
    made = MAKERS[name]()
    config = ModelConfig.of_values(made.config, tmp_path / "config.json")
    folder = write(tmp_path, made.config, made.tensors, 1)
    sides: dict[str, int] = {}
    for _, side, nbytes in parts_of_folder(folder, config):
        sides[side] = sides.get(side, 0) + nbytes
    assert sum(sides.values()) == sum(tensor.nbytes for tensor in made.tensors.values())
    per_expert = {name: tensor for name, tensor in made.tensors.items() if is_routed(name)}
    past = sum(tensor.nbytes for name, tensor in per_expert.items() if ".layers.4." in name)
    assert sides["experts"] == sum(tensor.nbytes for tensor in per_expert.values()) - past
    assert sides.get("unused", 0) == past


def test_a_layer_past_the_last_is_no_part_of_what_is_served(tmp_path: Path) -> None:
    config = ModelConfig.of_values({"model_type": "deepseek_v3", "num_hidden_layers": 2}, tmp_path / "config.json")
    parts = sort_parts(
        [
            ("model.layers.1.mlp.experts.0.gate_proj.weight", 10),
            ("model.layers.1.mlp.experts.0.gate_proj.weight_scale_inv", 1),
            ("model.layers.1.mlp.shared_experts.up_proj.weight", 20),
            ("model.layers.2.mlp.experts.0.gate_proj.weight", 40),
            ("model.layers.2.eh_proj.weight", 80),
            ("model.layers.1.mlp.gate.e_score_correction_bias", 160),
            ("lm_head.weight", 320),
            ("mtp.layers.0.mlp.experts.0.gate_proj.weight", 640),
            ("model.layers.2.embed_tokens.weight", 1280),
            ("model.layers.2.shared_head.head.weight", 2560),
        ],
        config,
    )
    assert {(part, side): nbytes for part, side, nbytes in parts} == {
        ("routed experts", "experts"): 11,
        ("shared experts", "router"): 20,
        ("multi-token prediction", "unused"): 80,
        ("its routed experts", "unused"): 680,
        ("its copies of embedding and head", "unused"): 3840,
        ("gate", "router"): 160,
        ("output head", "router"): 320,
    }


def test_a_folder_without_an_expert_and_an_index_that_lies_are_refused(tmp_path: Path) -> None:
    config = ModelConfig.of_values({"model_type": "mixtral", "num_hidden_layers": 2}, tmp_path / "config.json")
    save_file({"lm_head.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no tensor of a routed expert"):
        parts_of_folder(tmp_path, config)
    index = {"weight_map": {"model.norm.weight": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"has no tensor model\.norm\.weight"):
        parts_of_folder(tmp_path, config)


def test_a_hub_id_is_sized_from_headers_without_its_weights(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3_moe", tmp_path / "made")
    code = (
        "from experts.checkpoint.sizes.find import find_facts\n"
        "facts, path = find_facts('org/tiny')\n"
        "print(facts.basis, path, facts.weight_bytes('router') + facts.weight_bytes('experts'))"
    )
    with fake_hub() as hub:
        hub.add_folder("org/tiny", folder)
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**hub.environment(tmp_path / "home"), "PATH": "", "PYTHONPATH": str(Path(__file__).parents[4])},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    basis, path, nbytes = done.stdout.split()[-3:]
    header = 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert (basis, path) == ("headers", "org/tiny")
    assert int(nbytes) == (folder / "model.safetensors").stat().st_size - header
