"""A router and its shards have the weights of the checkpoint, or are refused by name, whatever became of its files."""

from __future__ import annotations

import random
import struct
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.spoiled_checkpoints import STEPS, TINY, Case, file_bytes, tiny_config, tiny_tensors
from tests.support.zygote.engine_zygote import Zygote

NUM_CASES = 300
CASES_S = 600.0  # 105 s on two cores that ten others shared


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    zygote = Zygote(tmp_path_factory.mktemp("weights") / "zygote", "engine", "weights_jobs")
    yield zygote
    zygote.close()


@pytest.fixture(scope="module")
def cases(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("cases")
    job = zygote.start("cases", folder=str(folder), seeds=list(range(NUM_CASES)))
    return zygote.wait(job, "cases", CASES_S)


def without(*names: str) -> Case:
    tensors = tiny_tensors()
    held = {name: tensor for name, tensor in tensors.items() if name not in names}
    return Case(random.Random(0), {"model.safetensors": held}, None, tiny_config())


def spoiled(data: bytes | None) -> Case:
    """A file with dense tensors only that is damaged."""
    case = without()
    dense = {name: t for name, t in case.files["model.safetensors"].items() if ".experts." not in name}
    experts = {name: t for name, t in case.files["model.safetensors"].items() if name not in dense}
    case.files = {"dense.safetensors": dense, "experts.safetensors": experts}
    case.index = {name: file for file, held in case.files.items() for name in held}
    case.raw["dense.safetensors"] = file_bytes(dense)[:-3] if data == b"cut" else data
    return case


LAYER = "model.layers.2."
LOADS = {
    "o_proj": (without(LAYER + "self_attn.o_proj.weight"), LAYER + "self_attn.o_proj.weight missing"),
    "gate": (without(LAYER + "mlp.gate.weight"), LAYER + "mlp.gate.weight missing"),
    "norm": (without("model.norm.weight"), "model.norm.weight missing"),
    "embedding": (without("model.embed_tokens.weight"), "model.embed_tokens.weight missing"),
    # A third of a fused parameter, which its like in other layers tell apart.
    "k_proj": (
        without(LAYER + "self_attn.k_proj.weight"),
        LAYER + "self_attn.k_proj.weight missing (parameter model.layers.2.self_attn.qkv_proj.weight, 98304 of its",
    ),
    "several": (
        without(LAYER + "self_attn.q_proj.weight", "model.layers.0.self_attn.q_norm.weight"),
        "model.layers.0.self_attn.q_norm.weight missing (parameter model.layers.0.self_attn.q_norm.weight); " + LAYER,
    ),
    "cut": (spoiled(b"cut"), "dense.safetensors: "),
    "pointer": (
        spoiled(b"version https://git-lfs.github.com/spec/v1\n"),
        "dense.safetensors: this is a Git LFS pointer",
    ),
    "header": (spoiled(struct.pack("<Q", 1 << 62)), f"dense.safetensors: header length {1 << 62} in a file of 8 bytes"),
    "empty": (spoiled(b""), "dense.safetensors: header length -1 in a file of 0 bytes"),
    "directory": (spoiled(None), "dense.safetensors: cannot be read: it is a directory"),
}


@pytest.fixture(scope="module")
def errors(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    folder = tmp_path_factory.mktemp("loads")
    folders = {name: str(case.write(folder / name)) for name, (case, _) in LOADS.items()}
    return zygote.wait(zygote.start("loads", folders={**folders, "intact": str(TINY)}), "errors", CASES_S)


@pytest.mark.parametrize("name", LOADS)
def test_what_a_router_lacks_is_named(errors: dict[str, str | None], name: str) -> None:
    found = str(errors[name])
    assert found.startswith("CheckpointError: ")
    assert LOADS[name][1] in found


def test_the_intact_checkpoint_loads(errors: dict[str, str | None]) -> None:
    """After all the broken ones, into the same model."""
    assert errors["intact"] is None


def test_no_case_gives_other_weights(cases: list[dict[str, Any]]) -> None:
    """Bytes equal to the intact model's, in vLLM's parameters and in every expert, give its tokens (test_layer.py)."""
    assert [case for case in cases if case["wrong"]] == []


def test_every_refusal_names_a_tensor_or_file_at_fault(cases: list[dict[str, Any]]) -> None:
    refused = [case for case in cases if case["refusal"] is not None]
    assert [c for c in refused if not any(name in c["refusal"] for name in c["culprits"])] == []


def test_what_is_in_order_is_served(cases: list[dict[str, Any]]) -> None:
    assert [case for case in cases if not case["culprits"] and case["refusal"] is not None] == []


def test_the_cases_are_of_every_kind_and_both_ends_occur(cases: list[dict[str, Any]]) -> None:
    assert len(cases) == NUM_CASES
    steps = Counter(step for case in cases for step in case["steps"])
    assert set(steps) == set(STEPS)
    assert min(steps.values()) > 10
    served = sum(case["refusal"] is None for case in cases)
    assert NUM_CASES / 10 < served < NUM_CASES / 2
    assert {case["side"] for case in cases} == {"both", "router", "shard"}
