"""Engines that pool instead of generating, with their experts on shards: what comes out is what vLLM's own gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.small_mesh import Mesh, mesh_of, replicated
from tests.support.zygote.engine_zygote import Zygote
from tests.support.zygote.refusal_jobs import PROMPTS

pytestmark = pytest.mark.whole_machine

NUM_LAYERS, NUM_EXPERTS, HIDDEN = 2, 64, 64
OVERRIDES = {
    "hidden_size": HIDDEN, "moe_intermediate_size": 64, "num_experts": NUM_EXPERTS, "num_experts_per_tok": 2,
}  # fmt: skip
# Sums in another order differ by some 1e-7 after two layers; a wrong expert by some 1e-2.
CLOSE = {"abs": 1e-5}
NOTHING: list[float] = []
ENGINE_S = 400.0


@pytest.fixture(scope="module")
def model(vllm_zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe") / "model"
    job = vllm_zygote.start("checkpoint", family="qwen3_moe", path=str(path), overrides=OVERRIDES)
    vllm_zygote.wait(job, "made")
    return path


@pytest.fixture(scope="module")
def classifier(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as one that pools by its architecture: three classes in place of the head."""
    folder = tmp_path_factory.mktemp("classifier")
    tensors = {name: t for name, t in load_file(model / "model.safetensors").items() if name != "lm_head.weight"}
    tensors["score.weight"] = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(0))
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    labels = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    config |= {"architectures": ["Qwen3MoeForSequenceClassification"], **labels}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def mesh(model: Path) -> Iterator[Mesh]:
    with mesh_of(model, replicated(NUM_LAYERS, NUM_EXPERTS, 2, 1)) as running:
        yield running


def pooled(zygote: Zygote, model: Path, task: str, mesh: Mesh | None, **options: Any) -> dict[str, Any]:
    membership = None if mesh is None else mesh.membership().to_dict()
    job = zygote.start("pool", model=str(model), task=task, prompts=PROMPTS, options=options, membership=membership)
    zygote.wait(job, "done")
    return zygote.events(job)


@pytest.fixture(scope="module")
def expected(vllm_zygote: Zygote, model: Path) -> list[list[float]]:
    """Embeddings of PROMPTS by vLLM's own engine."""
    return pooled(vllm_zygote, model, "embed", None, convert="embed")["pooled"]


def test_embeddings_are_those_of_vllm(
    vllm_zygote: Zygote, model: Path, mesh: Mesh, expected: list[list[float]]
) -> None:
    """Of prompts in one batch, in chunks of fewer tokens than the longest has."""
    chunked = {"max_num_batched_tokens": 24, "max_num_seqs": 8}
    facts = pooled(vllm_zygote, model, "embed", mesh, runner="pooling", **chunked)
    assert [len(embedding) for embedding in expected] == [HIDDEN] * len(PROMPTS)
    for found, right in zip(facts["pooled"], expected, strict=True):
        assert found == pytest.approx(right, **CLOSE)
    assert expected[0] != pytest.approx(expected[1], **CLOSE), "they tell prompts apart"
    status = facts["status"]
    assert (status["failovers"], status["fallback_pairs"], status["refused_requests"]) == (0, 0, 0)
    assert status["rows"] >= NUM_LAYERS * sum(map(len, PROMPTS)), "through the shards"
    assert status["steps"] > 2


def test_a_model_that_classifies_by_its_architecture_gives_the_classes_of_vllm(
    vllm_zygote: Zygote, classifier: Path
) -> None:
    expected = pooled(vllm_zygote, classifier, "classify", None)["pooled"]
    with mesh_of(classifier, replicated(NUM_LAYERS, NUM_EXPERTS, 2, 1)) as mesh:
        found = pooled(vllm_zygote, classifier, "classify", mesh)["pooled"]
    assert [sum(classes) for classes in expected] == pytest.approx([1.0] * len(PROMPTS))
    for ours, right in zip(found, expected, strict=True):
        assert ours == pytest.approx(right, **CLOSE)
    assert expected[0] != pytest.approx(expected[2], **CLOSE), "they tell prompts apart"


@pytest.fixture(scope="module", params=[1, 2], ids=["one worker", "two workers"])
def facts(request: pytest.FixtureRequest, vllm_zygote: Zygote, model: Path, mesh: Mesh) -> dict[str, Any]:
    """Of an engine of one worker; and of two, of which the second refuses rows and the first one's output is heard."""
    membership = mesh.membership().to_dict()
    job = vllm_zygote.start("refusals_of_prompts", model=str(model), membership=membership, workers=request.param)
    vllm_zygote.wait(job, "done", ENGINE_S)
    return {**vllm_zygote.events(job), "workers": request.param}


def same(found: list[list[float]], expected: list[list[float]]) -> bool:
    return all(ours == pytest.approx(right, **CLOSE) for ours, right in zip(found, expected, strict=True))


def test_embeddings_of_any_number_of_workers_are_those_of_vllm(
    facts: dict[str, Any], expected: list[list[float]]
) -> None:
    assert same(facts["alone"], expected)


def test_the_scene_is_what_the_tests_need(facts: dict[str, Any]) -> None:
    """Experts of the shared prefix alone are lost; the second prompt finds the prefix in the cache."""
    assert facts["lost"]
    assert facts["prefix_was_found"]
    assert [len(embedding) for embedding in facts["alone"]] == [HIDDEN] * len(PROMPTS)


def test_only_prompts_that_need_lost_experts_end_without_an_embedding(facts: dict[str, Any]) -> None:
    """The second needs none itself, but it reads what the first wrote to the KV cache in the same step."""
    first, second, *others = facts["refused"]
    assert first == second == NOTHING
    assert same(others, facts["alone"][2:])
    status = facts["status_of_refused"]
    assert status["refused_requests"] == 1
    assert (status["fallback_pairs"] == 0) == (facts["workers"] == 1), "the first of two has time"
    assert status["uncovered_pairs"] == len(facts["lost"])


def test_nothing_that_lacked_experts_is_found_in_the_cache_again(facts: dict[str, Any]) -> None:
    assert same(facts["after"], facts["alone"])


def test_with_time_for_them_the_router_computes_the_same_embeddings(facts: dict[str, Any]) -> None:
    assert same(facts["computed"], facts["alone"])
    status = facts["status_of_computed"]
    assert status["refused_requests"] == 1, "that of before"
    assert status["fallback_pairs"] > 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"enable_lora": True}, "enable_lora does not go with an engine that pools"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "speculative_config does not go with an engine that pools",
        ),
    ],
)
def test_what_does_not_go_along_is_refused_by_the_engine(
    vllm_zygote: Zygote, model: Path, mesh: Mesh, options: dict[str, Any], named: str
) -> None:
    assert named in pooled(vllm_zygote, model, "embed", mesh, runner="pooling", **options)["error"]
