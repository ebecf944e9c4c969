"""Shards that keep FP8 blocks as stored: the values of plain floats, in a quarter of the memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.small_mesh import assert_matches, mesh_of, oracle, random_batch, replicated, run

NUM_LAYERS, NUM_EXPERTS, D, I = 2, 6, 160, 136


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(NUM_LAYERS):
        for expert in range(NUM_EXPERTS):
            for name, shape in (("gate_proj", (I, D)), ("up_proj", (I, D)), ("down_proj", (D, I))):
                stem = f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"
                data = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) & 0xBF
                tensors[stem] = data.view(torch.float8_e4m3fn)
                tensors[stem + "_scale_inv"] = torch.rand(2, 2, generator=generator) * (4.0 / shape[1] ** 0.5)
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "qwen3_moe", "hidden_act": "silu", "num_hidden_layers": NUM_LAYERS, "hidden_size": D}
    config |= {"num_experts": NUM_EXPERTS, "num_experts_per_tok": 3, "moe_intermediate_size": I}
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kernel", ["torch_dequant", "torch_loop"])
def test_parity_and_memory(model: Path, kernel: str) -> None:
    with mesh_of(model, replicated(NUM_LAYERS, NUM_EXPERTS, 2, 1), kernel=kernel) as mesh:
        router = mesh.router()
        for num_tokens in (0, 1, 33):
            for layer in range(NUM_LAYERS):
                batch = random_batch(num_tokens, hidden_size=D, seed=layer)
                assert_matches(run(router, layer, batch), oracle(mesh.checkpoint, layer, batch))
        status = mesh.shards[0].status()
    matrix = 3 * D * I
    expected = matrix + 3 * 4 * 4 if kernel == "torch_dequant" else 4 * matrix
    assert status.kernel == kernel
    assert status.loaded_bytes == NUM_LAYERS * NUM_EXPERTS // 2 * expected


def test_an_expert_that_the_quantization_leaves_out_is_served(model: Path, tmp_path: Path) -> None:
    """Another one than the first of its layer, which used to end its shard."""
    tensors = load_file(model / "model.safetensors")
    stem = "model.layers.1.mlp.experts.4.up_proj.weight"
    del tensors[stem + "_scale_inv"]
    generator = torch.Generator().manual_seed(1)
    tensors[stem] = torch.randn(I, D, generator=generator) / D**0.5
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    with mesh_of(tmp_path, replicated(NUM_LAYERS, NUM_EXPERTS, 2, 1), kernel="torch_loop") as mesh:
        router = mesh.router()
        for layer in range(NUM_LAYERS):
            batch = random_batch(33, hidden_size=D, seed=layer)
            assert_matches(run(router, layer, batch), oracle(mesh.checkpoint, layer, batch))
        assert router.status().fallback_pairs == 0
