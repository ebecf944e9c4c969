"""The experts of a layer for multi-token prediction (MTP): read where it is asked for, as one layer more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experts.checkpoint import CheckpointError, ExpertCheckpoint
from experts.checkpoint.architectures.mtp import MTP_LAYERS
from tests.support.expected_experts import PROJ, D, E, Expected, I, one_tensor_per_matrix
from tests.support.hub_names import MAKERS, write


def with_mtp_layer(model_type: str) -> tuple[Expected, int, str]:
    """A checkpoint with all experts of its MTP layer, that layer's number, and the stem of its experts' names."""
    if model_type == "qwen3_next":
        made, stem = MAKERS["qwen3_moe"](), "mtp.layers.0.mlp.experts."
        made.config["model_type"] = "qwen3_next"
    else:
        made, stem = MAKERS["deepseek_v3"](), "model.layers.4.mlp.experts."
        made.config["model_type"] = model_type
    mtp = one_tensor_per_matrix({}, (4,), stem + "{e}.", PROJ)
    for tensor in mtp.tensors.values():
        tensor.neg_()  # another one than a decoder layer's; the expected experts are the same tensors
    made.tensors |= mtp.tensors
    made.experts |= mtp.experts
    return made, 4, stem


@pytest.mark.parametrize("model_type", sorted(MTP_LAYERS))
def test_the_mtp_layer_is_the_last_one_where_it_is_asked_for(tmp_path: Path, model_type: str) -> None:
    made, layer_id, stem = with_mtp_layer(model_type)
    folder = write(tmp_path, made.config, made.tensors)
    without, asked = ExpertCheckpoint.open(folder), ExpertCheckpoint.open(folder, mtp=True)
    assert asked.spec.layer_ids == (*without.spec.layer_ids, layer_id)
    assert (asked.spec.num_layers, asked.spec.num_decoder_layers) == (4, 3)
    assert (without.spec.num_layers, without.spec.num_decoder_layers) == (3, 3)
    asked.check()
    for layer, each in enumerate(asked.spec.layer_ids):
        for expert in range(E):
            gate, up, down = made.experts[each, expert]
            got = asked.read_expert(layer, expert, torch.float32)
            torch.testing.assert_close(got.w13_2ID, torch.cat([gate, up]), rtol=0, atol=0)
            torch.testing.assert_close(got.w2_DI, down, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"layer is 3, expected 0\.\.2"):
        without.read_expert(3, 0, torch.float32)
    assert without.facts != asked.facts, "a router and a shard of which just one has the layer must not meet"
    for checkpoint in (without, asked):
        assert checkpoint.owns(f"{stem}0.up_proj.weight"), "no router reads it"


def test_an_mtp_layer_that_is_not_whole_is_named(tmp_path: Path) -> None:
    made, _, stem = with_mtp_layer("glm4_moe")
    del made.tensors[f"{stem}2.down_proj.weight"]
    folder = write(tmp_path, made.config, made.tensors)
    ExpertCheckpoint.open(folder).check()
    with pytest.raises(CheckpointError, match=rf"{stem}2\.down_proj\.weight is missing"):
        ExpertCheckpoint.open(folder, mtp=True).check()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "kimi_k2"}, "where the experts of an MTP layer of 'kimi_k2' are is not known, expected one of"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is 2, expected 1 MTP layer"),
        ({"num_nextn_predict_layers": None}, "num_nextn_predict_layers is 0, expected 1 MTP layer"),
    ],
)
def test_what_has_no_mtp_layer_with_experts_is_refused(
    tmp_path: Path, changes: dict[str, object], expected: str
) -> None:
    made, _, _ = with_mtp_layer("deepseek_v3")
    with pytest.raises(CheckpointError, match=expected):
        ExpertCheckpoint.open(write(tmp_path, {**made.config, **changes}, made.tensors), mtp=True)


def test_sizes_are_those_of_the_decoder_layers(tmp_path: Path) -> None:
    made, _, stem = with_mtp_layer("deepseek_v3")
    made.tensors[f"{stem}0.gate_proj.weight"] = torch.zeros(I, D + 1)
    with pytest.raises(CheckpointError, match=f"has shape \\[{I}, {D + 1}\\], expected \\[{I}, {D}\\]"):
        ExpertCheckpoint.open(write(tmp_path, made.config, made.tensors), mtp=True).check()
