"""The other endpoints of a router, and what is said of those that it does not have."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.support.model_api import TIMEOUT_S, ModelApi

CHAT: list[Any] = [{"role": "user", "content": "def"}]


def test_tokens_of_a_text_and_back(api: ModelApi) -> None:
    text = "def main(argv):\n"
    tokens = api.post("/tokenize", prompt=text, add_special_tokens=False)["tokens"]
    assert len(tokens) > 1
    assert api.post("/detokenize", tokens=tokens)["prompt"] == text
    of_chat = api.post("/tokenize", messages=CHAT)["count"]
    assert api.post("/v1/messages/count_tokens", messages=CHAT)["input_tokens"] == of_chat


def test_anthropics_messages_say_what_a_chat_says(api: ModelApi) -> None:
    asked = {"messages": CHAT, "max_tokens": 8, "temperature": 0}
    [part] = api.post("/v1/messages", **asked)["content"]
    assert part["text"] == api.post("/v1/chat/completions", **asked)["choices"][0]["message"]["content"]


def test_several_chats_in_one_request(api: ModelApi) -> None:
    asked = {"max_tokens": 6, "temperature": 0}
    answer = api.post("/v1/chat/completions/batch", messages=[CHAT, CHAT], **asked)
    alone = api.post("/v1/chat/completions", messages=CHAT, **asked)["choices"][0]["message"]["content"]
    assert [choice["message"]["content"] for choice in answer["choices"]] == [alone] * 2


def test_labels_are_scored_by_the_next_token(api: ModelApi) -> None:
    answer = api.post("/generative_scoring", query="def ", items=["main(", "x"], label_token_ids=[13, 100])
    assert all(0 < each["score"] < 1 for each in answer["data"])
    assert len({each["score"] for each in answer["data"]}) == 2


def test_structured_decisions_are_refused_for_this_model(api: ModelApi) -> None:
    questions = {"q": {"type": "choice", "instructions": "Which?", "criteria": {"join": None, "split": None}}}
    status, error = api.refused("/v1/systemone", state="os.path", questions=questions)
    assert (status, error["code"]) == (400, "invalid_value")
    assert "The model does not support the structured decision API" in error["message"]


def test_vllms_series_count_what_the_engine_made(api: ModelApi) -> None:
    before = api.counter("vllm:generation_tokens_total")
    api.tokens("def", 5, ignore_eos=True)
    assert api.counter("vllm:generation_tokens_total") == before + 5


def test_a_prompt_that_was_seen_is_taken_from_the_prefix_cache(api: ModelApi) -> None:
    """With the same tokens after it."""
    prompt = "import os\nimport sys\n" * 12
    first = api.tokens(prompt, 8)
    before = api.counter("vllm:prefix_cache_hits_total")
    answer = api.post("/v1/completions", prompt=prompt, max_tokens=8, temperature=0, return_token_ids=True)
    assert answer["choices"][0]["token_ids"] == first
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= 32
    assert api.counter("vllm:prefix_cache_hits_total") == before + cached


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/v1/embeddings", "are for routers with the option runner: pooling"),
        ("/v1/score", "are for routers with the option runner: pooling"),
        ("/v2/rerank", "are for routers with the option runner: pooling"),
        ("/classify", "are for routers with the option runner: pooling"),
        ("/v1/audio/transcriptions", "no model whose experts are on shards takes or makes sound"),
        ("/sleep", "it controls the engine, which clients may not do"),
        ("/reset_prefix_cache", "it controls the engine, which clients may not do"),
        ("/v1/files", "vLLM does not have this part of OpenAI's API"),
        ("/v1/images/generations", "vLLM does not have this part of OpenAI's API"),
        ("/inference/v1/generate", "it is an internal part of vLLM's own scale-out"),
        ("/v1/chat/completions/render", "it is an internal part of vLLM's own scale-out"),
        ("/invocations", "it is SageMaker's"),
        ("/tokenizer_info", "it shows the chat template"),
    ],
)
def test_an_endpoint_that_is_not_here_says_why(api: ModelApi, path: str, why: str) -> None:
    status, error = api.refused(path, input="x")
    assert (status, error["code"]) == (404, "unknown_url")
    assert error["message"].startswith(f"this service has no POST {path}: ")
    assert why in error["message"]


def test_a_path_that_nobody_knows_points_to_the_docs(api: ModelApi) -> None:
    assert api.refused("/v1/nothing")[1]["message"] == "there is no POST /v1/nothing: see /docs"
    assert httpx.get(f"{api.url}/openapi.json", timeout=TIMEOUT_S).json()["paths"]["/v1/responses"]
