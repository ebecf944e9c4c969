"""Embeddings and scores over HTTP, of the tiny model with its experts on two shards: vLLM's own engine gives the same.

Float32. Shards and checkpoint are those of the engine that generates in the tests beside this one.
"""

from __future__ import annotations

import base64
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from cluster.config.llm_sections import TracingSection
from cluster.keys.command import line_of
from tests.support.model_api import TIMEOUT_S, ModelApi
from tests.support.otlp_receiver import collector
from tests.support.small_mesh import Mesh, mesh_of, replicated
from tests.support.waiting import wait_for
from tests.support.zygote.engine_zygote import Zygote

TINY = Path(__file__).parents[3] / "examples" / "tiny-moe"
MODEL_ID = "tiny-embed"
TEXTS = ["def main(", "import os\nimport sys\n", "The quick brown fox", "a" * 100]
# Sums in another order differ by some 1e-7 after four layers; a wrong expert by some 1e-2.
CLOSE = {"rtol": 0, "atol": 1e-5}
# A reranker made of a model that generates: how much likelier than "b" it holds "a" to come next.
RERANKER = {
    "hf_overrides": {
        "architectures": ["Qwen3MoeForSequenceClassification"],
        "classifier_from_token": ["b", "a"],
        "method": "from_2_way_softmax",
    }
}
SERVED_WITH = {"runner": "pooling", "hf_overrides": {"is_matryoshka": True}, "block_size": 32}
ADA, BOB = "sk-ada-0123456789", "sk-bob-0123456789"


def start(zygote: Zygote, membership: dict[str, Any], **more: Any) -> tuple[int, str]:
    asked = {"model": str(TINY), "model_id": MODEL_ID, "engine_kwargs": SERVED_WITH, **more}
    job = zygote.start("serve", membership=membership, **asked)
    return job, zygote.wait(job, "url")


@pytest.fixture(scope="module")
def embedder(feature_zygote: Zygote, membership: dict[str, Any]) -> Iterator[ModelApi]:
    job, url = start(feature_zygote, membership)
    yield ModelApi(url, MODEL_ID)
    feature_zygote.stop(job)


@pytest.fixture(scope="module")
def expected(feature_zygote: Zygote, embedder: ModelApi) -> np.ndarray:
    """Embeddings of TEXTS [4, 256] by vLLM's own engine."""
    prompts = [embedder.post("/tokenize", prompt=text)["tokens"] for text in TEXTS]
    job = feature_zygote.start("pool", model=str(TINY), task="embed", prompts=prompts, options={"runner": "pooling"})
    feature_zygote.wait(job, "done")
    return np.array(feature_zygote.events(job)["pooled"])


def vectors(answer: dict[str, Any]) -> np.ndarray:
    assert [each["index"] for each in answer["data"]] == list(range(len(answer["data"])))
    return np.array([each["embedding"] for each in answer["data"]])


def test_embeddings_are_those_of_vllm(embedder: ModelApi, expected: np.ndarray) -> None:
    """Of one input and of several, as texts, as token ids, and as the openai package asks."""
    assert np.abs(expected[0] - expected[1]).max() > 1e-3, "they tell inputs apart"
    answer = embedder.post("/v1/embeddings", input=TEXTS)
    np.testing.assert_allclose(vectors(answer), expected, **CLOSE)
    tokens = [embedder.post("/tokenize", prompt=text)["tokens"] for text in TEXTS]
    num_tokens = sum(map(len, tokens))
    usage = {name: value for name, value in answer["usage"].items() if value is not None}
    assert usage == {"prompt_tokens": num_tokens, "total_tokens": num_tokens, "completion_tokens": 0}
    for asked in (TEXTS[2], tokens[2], [tokens[2]]):
        np.testing.assert_allclose(vectors(embedder.post("/v1/embeddings", input=asked)), expected[2:3], **CLOSE)
    by_client = embedder.client.embeddings.create(model=MODEL_ID, input=TEXTS)
    np.testing.assert_allclose(np.array([each.embedding for each in by_client.data]), expected, **CLOSE)


def test_formats_and_dimensions_are_as_vllm_takes_them(embedder: ModelApi, expected: np.ndarray) -> None:
    encoded = embedder.post("/v1/embeddings", input=TEXTS[0], encoding_format="base64")["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(encoded), np.float32), expected[0], **CLOSE)
    short = vectors(embedder.post("/v1/embeddings", input=TEXTS[0], dimensions=8))[0]
    np.testing.assert_allclose(short, expected[0, :8] / np.linalg.norm(expected[0, :8]), **CLOSE)
    as_it_is = embedder.post("/pooling", input=TEXTS[:1])["data"][0]["data"]
    np.testing.assert_allclose(np.array(as_it_is), expected[0], **CLOSE)
    of_cohere = embedder.post("/v2/embed", texts=TEXTS, embedding_types=["float"])["embeddings"]["float"]
    np.testing.assert_allclose(np.array(of_cohere), expected, **CLOSE)


def test_scores_are_cosines_of_the_embeddings(embedder: ModelApi, expected: np.ndarray) -> None:
    cosines = expected[0] @ expected[1:].T
    answer = embedder.post("/score", queries=TEXTS[0], documents=TEXTS[1:])
    np.testing.assert_allclose([each["score"] for each in answer["data"]], cosines, **CLOSE)
    ranked = embedder.post("/v1/rerank", query=TEXTS[0], documents=TEXTS[1:])["results"]
    assert [each["index"] for each in ranked] == np.argsort(-cosines).tolist()
    np.testing.assert_allclose([each["relevance_score"] for each in ranked], np.sort(cosines)[::-1], **CLOSE)


def test_a_reranker_gives_the_scores_of_vllm(feature_zygote: Zygote, membership: dict[str, Any]) -> None:
    """Query and document together in one prompt; a model with one class, which the architecture alone makes pool."""
    plain = feature_zygote.start("score", model=str(TINY), query=TEXTS[0], documents=TEXTS[1:], options=RERANKER)
    expected = np.array(feature_zygote.wait(plain, "scores"))
    assert np.abs(expected - expected[0]).max() > 1e-2, "they tell documents apart"
    job, url = start(feature_zygote, membership, engine_kwargs=RERANKER)
    reranker = ModelApi(url, MODEL_ID)
    found = reranker.post("/score", queries=TEXTS[0], documents=TEXTS[1:])["data"]
    np.testing.assert_allclose([each["score"] for each in found], expected, **CLOSE)
    ranked = reranker.post("/v2/rerank", query=TEXTS[0], documents=TEXTS[1:], top_n=2)["results"]
    assert [each["index"] for each in ranked] == np.argsort(-expected).tolist()[:2]
    classes = reranker.post("/classify", input=TEXTS[:2])["data"]
    assert [each["num_classes"] for each in classes] == [1, 1]
    status, error = reranker.refused("/v1/embeddings", input="x")
    assert (status, error["code"]) == (404, "unknown_url")
    feature_zygote.stop(job)


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        ("/v1/embeddings", {"input": "def " * 1000}, "input", "context_length_exceeded"),
        ("/v1/embeddings", {"input": [5] * 1000}, "input", "context_length_exceeded"),
        ("/v1/embeddings", {"input": []}, "input", "invalid_value"),
        ("/v1/embeddings", {"input": [[]]}, "input", "invalid_value"),
        ("/v1/embeddings", {"input": ""}, "input", "invalid_value"),
        ("/v1/embeddings", {"input": ["a"] * 257}, "input", "array_above_max_length"),
        ("/v1/embeddings", {"input": "a", "dimensions": 1000}, None, "invalid_value"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "x"}, "encoding_format", "invalid_value"),
        ("/v1/embeddings", {"input": [-1]}, "input", "integer_below_min_value"),
        ("/v1/embeddings", {"input": [999_999]}, "input", "invalid_value"),
        ("/score", {"queries": "a", "documents": ["def " * 1000]}, "documents", "context_length_exceeded"),
    ],
)
def test_mistakes_are_told_in_openais_words(
    embedder: ModelApi, path: str, body: dict[str, Any], param: str | None, code: str
) -> None:
    status, error = embedder.refused(path, **body)
    assert (status, error["param"], error["code"]) == (400, param, code), error["message"]


def test_another_model_is_not_found(embedder: ModelApi) -> None:
    with pytest.raises(openai.NotFoundError):
        embedder.client.embeddings.create(model="other", input="a")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/classify"])
def test_a_path_of_other_engines_says_what_is_there(embedder: ModelApi, path: str) -> None:
    status, error = embedder.refused(path, prompt="x")
    assert (status, error["code"]) == (404, "unknown_url")
    assert error["message"] == (
        f"this service has no POST {path}: its engine generates no text, and pools in one way only; it has /pooling, "
        "/rerank, /score, /v1/embeddings, /v1/rerank, /v1/score, /v2/embed, /v2/rerank"
    )


def test_one_pool_of_experts_serves_an_engine_that_generates_and_one_that_embeds(
    api: ModelApi, embedder: ModelApi, expected: np.ndarray
) -> None:
    """At the same time, through the same two shards."""
    alone = api.tokens("def main(", 24)
    with ThreadPoolExecutor(4) as threads:
        tokens = [threads.submit(api.tokens, "def main(", 24) for _ in range(2)]
        embeddings = [threads.submit(embedder.post, "/v1/embeddings", input=TEXTS) for _ in range(8)]
        assert [each.result(TIMEOUT_S) for each in tokens] == [alone] * 2
        for each in embeddings:
            np.testing.assert_allclose(vectors(each.result(TIMEOUT_S)), expected, **CLOSE)


def test_health_is_a_prompt_that_the_engine_pools(embedder: ModelApi) -> None:
    for path in ("/ready", "/health"):
        answer = httpx.get(f"{embedder.url}{path}", timeout=TIMEOUT_S)
        assert (answer.status_code, answer.json()["status"]) == (200, "ok"), answer.text
    assert answer.json()["routers"][0]["how"] == "probe"


def test_a_traced_embedding_has_spans_down_to_the_shards(feature_zygote: Zygote, membership: dict[str, Any]) -> None:
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"}
    with collector() as received:
        tracing = {"otlp_endpoint": received.endpoint, "step_interval": 1, "layers_per_step": 4}
        section = TracingSection.model_validate(tracing)
        options = {**SERVED_WITH, "otlp_traces_endpoint": received.endpoint}
        job, url = start(
            feature_zygote, membership, engine_kwargs=options, tracing=section.of_steps().model_dump(),
            env_vars={**section.environment(), "OTEL_BSP_SCHEDULE_DELAY": "200"},
        )  # fmt: skip
        body = {"model": MODEL_ID, "input": TEXTS[0]}
        answer = httpx.post(f"{url}/v1/embeddings", json=body, headers=headers, timeout=TIMEOUT_S)
        assert answer.status_code == 200, answer.text
        wanted = {"llm_request", "step", *(f"moe layer {layer}" for layer in range(4)), "shard 0", "shard 1"}
        wait_for(lambda: wanted <= {span.name for span in received.of_trace(trace_id)}, 60, "spans")
        feature_zygote.stop(job)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """Two shards, each with all experts."""
    with mesh_of(TINY, replicated(4, 32, 2, 2), kernel="torch_loop") as running:
        yield running


def test_a_killed_shard_costs_no_embedding_and_without_any_there_is_none(
    feature_zygote: Zygote, mesh: Mesh, expected: np.ndarray, tmp_path: Path
) -> None:
    """With keys, of which one may not use this model. Its router has no time to compute experts itself."""
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"{line_of(ADA, name='ada')}\n{line_of(BOB, name='bob', models=['other'])}\n")
    told = mesh.membership(epoch=1).to_dict()
    job, url = start(feature_zygote, told, http={"keys_file": str(keys)}, fallback_max_ms_per_step=0.0)

    def ask(key: str | None = ADA) -> httpx.Response:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        body = {"model": MODEL_ID, "input": TEXTS * 8}
        return httpx.post(f"{url}/v1/embeddings", json=body, headers=headers, timeout=TIMEOUT_S)

    def error(answer: httpx.Response) -> tuple[int, str]:
        return answer.status_code, answer.json()["error"]["code"]

    assert error(ask(None)) == (401, "invalid_api_key")
    assert error(ask(BOB)) == (404, "model_not_found")
    with ThreadPoolExecutor(4) as threads:
        running = [threads.submit(ask) for _ in range(12)]
        assert running[0].result(TIMEOUT_S).status_code == 200
        mesh.shards[0].signal(signal.SIGKILL)
        for each in running:
            answer = each.result(TIMEOUT_S)
            assert answer.status_code == 200, answer.text
            np.testing.assert_allclose(vectors(answer.json()), np.tile(expected, (8, 1)), **CLOSE)
    mesh.shards[1].signal(signal.SIGKILL)
    answer = ask()
    assert error(answer) == (503, "experts_unavailable")
    assert answer.headers["retry-after"] == "1"
    health = httpx.get(f"{url}/health", timeout=TIMEOUT_S)
    assert health.status_code == 503
    assert "experts" in health.json()["reason"]
    assert httpx.get(f"{url}/live", timeout=TIMEOUT_S).status_code == 200
    feature_zygote.stop(job)
