"""Whole engines over routed experts in each format: the tokens of the same model whose experts are plain floats.

All formats hold the same weights without rounding (`quantized_formats.Exact`), so that one reference does for all.
Where vLLM takes a format's settings in float32, that is vLLM's own engine over floats, and log-probabilities agree as
far as in test_parity_families. It takes the others in 16 bits only, where two engines round differently; there it is
our engine over floats, which computes the same to the last bit. Formats that differ in packing alone are left to the
tests of reading.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from experts.checkpoint import ExpertCheckpoint
from experts.protocol.membership import Membership, ShardEndpoint
from experts.protocol.settings import ShardSettings
from placement.placement import Placement
from tests.support.quantized_formats import FORMATS, exact
from tests.support.zygote.engine_zygote import Zygote

pytestmark = pytest.mark.whole_machine

TOLERANCE = 1e-4
SHARDS = 2
WIDTH, HIDDEN = 64, 64  # whole groups of every format
OVERRIDES = {"hidden_size": HIDDEN, "moe_intermediate_size": WIDTH}
IN_FLOAT32 = ("int4_zeros", "w8a8", "fp8_channel", "nvfp4")
IN_BFLOAT16 = ("awq", "gptq", "fp8", "nvfp4_modelopt")
DENSE = ["self_attn", "lm_head", "mlp.gate", "norm", "embed"]


@dataclass
class Scene:
    """Zygotes, the model with plain experts, and what was computed of it by dtype."""

    engine: Zygote
    shard: Zygote
    folder: Path
    plain: Path
    references: dict[str, Path] = field(default_factory=dict)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("formats")
    engine, shard = Zygote(folder / "engine", "engine"), Zygote(folder / "shard", "shard")
    plain = folder / "plain"
    engine.wait(engine.start("make", family="qwen3_moe", path=str(plain), overrides=OVERRIDES), "changed")
    write_experts(plain, plain, None)
    yield Scene(engine, shard, folder, plain)
    shard.close()
    engine.close()


def write_experts(plain: Path, folder: Path, name: str | None) -> None:
    """The model of `plain` with routed experts of the same weights in a format, or as float32."""
    tensors = load_file(plain / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    experts = sorted(key.removesuffix(".weight") for key in tensors if ".experts." in key)
    rng = np.random.default_rng(0)
    for module in experts:
        matrix = exact(*tensors.pop(f"{module}.weight").shape, rng)
        if name is None:
            tensors[f"{module}.weight"] = torch.from_numpy(matrix.values).float()
        else:
            # A generator of its own: formats draw what the weights leave open, such as zeros.
            made = FORMATS[name].make(*matrix.integers.shape, np.random.default_rng(1), matrix)
            assert np.array_equal(made.values, matrix.values)
            tensors |= {f"{module}.{each}": tensor for each, tensor in made.tensors.items()}
    if name is not None:
        config["quantization_config"] = sparing_dense(FORMATS[name].config)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def sparing_dense(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with all but routed experts left out, in each method's words."""
    method = settings["quant_method"]
    if method == "gptq":
        return {**settings, "dynamic": {f"-:.*{name}.*": {} for name in DENSE}}
    if method == "compressed-tensors":
        return {**settings, "ignore": [f"re:.*{name}.*" for name in DENSE]}
    key = {"awq": "modules_to_not_convert", "fp8": "ignored_layers", "modelopt": "ignore"}[method]
    names = [f"*{name}*" if method == "modelopt" else name for name in DENSE]
    if method == "fp8":
        names = [f"model.layers.{layer}.self_attn.{p}_proj" for layer in range(2) for p in "qkvo"]
        names += [f"model.layers.{layer}.mlp.gate" for layer in range(2)]
    return {**settings, key: names}


def run(scene: Scene, model: Path, dtype: str, kernel: str, reference: Path | None) -> dict[str, Any]:
    """Our engine with two shards; without a reference, its tokens alone."""
    spec = ExpertCheckpoint.open(model).spec
    placement = Placement.linear(spec.num_layers, spec.num_experts, SHARDS)
    settings = ShardSettings(model_path=str(model), dtype=dtype, kernel=kernel).model_dump()
    jobs = [
        scene.shard.start("shard", settings=settings, placement=placement.to_json(), rank=rank)
        for rank in range(SHARDS)
    ]
    endpoints = tuple(ShardEndpoint(**scene.shard.wait(job, "endpoint")) for job in jobs)
    result = scene.folder / f"{model.name}-{dtype}-{kernel}.json"
    arguments = {"model": str(model), "result": str(result), "dtype": dtype}
    memberships = [Membership(1, placement, endpoints).to_dict()]
    job = scene.engine.start("mesh", reference=str(reference or ""), memberships=memberships, **arguments)
    scene.engine.wait(job, "result")
    for each in jobs:
        scene.shard.stop(each)
    (found,) = json.loads(result.read_text())["runs"]
    assert found["status"]["fallback_pairs"] == found["status"]["failovers"] == 0
    assert all(rows > 0 for rows in found["status"]["shard_rows"])
    return found


def reference_of(scene: Scene) -> Path:
    """vLLM's own engine over floats, in float32."""
    if "float32" not in scene.references:
        path = scene.references["float32"] = scene.folder / "vllm.json"
        job = scene.engine.start("reference", model=str(scene.plain), result=str(path))
        scene.engine.wait(job, "result")
    return scene.references["float32"]


def model_in(scene: Scene, name: str) -> Path:
    folder = scene.folder / name
    if not folder.exists():
        write_experts(scene.plain, folder, name)
    return folder


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_tokens_are_those_of_vllm_over_floats(scene: Scene, name: str) -> None:
    path = reference_of(scene)
    kernel = "torch_dequant" if FORMATS[name].kept else "torch_loop"
    found, expected = run(scene, model_in(scene, name), "float32", kernel, path), json.loads(path.read_text())
    np.testing.assert_allclose(found["logprobs"], expected["logprobs"], rtol=0, atol=TOLERANCE)
    for ours, theirs, gaps in zip(found["ids"], expected["ids"], expected["gaps"], strict=True):
        differing = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        assert differing is None or gaps[differing] <= TOLERANCE


@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_tokens_are_those_of_our_engine_over_floats(scene: Scene, name: str) -> None:
    if "bfloat16" not in scene.references:
        scene.references["bfloat16"] = scene.folder / "ours.json"
        expected = run(scene, scene.plain, "bfloat16", "torch_loop", reference_of(scene))
        scene.references["bfloat16"].write_text(json.dumps(expected))
    expected = json.loads(scene.references["bfloat16"].read_text())
    kernel = "torch_dequant" if FORMATS[name].kept else "torch_loop"
    found = run(scene, model_in(scene, name), "bfloat16", kernel, reference_of(scene))
    assert found["ids"] == expected["ids"]
    assert found["logprobs"] == expected["logprobs"]
