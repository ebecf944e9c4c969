"""The OpenAI API through the `openai` package, experts on three shards."""

from __future__ import annotations

import concurrent.futures

import openai
import pytest

from tests.support.serve.service import Service

PROMPT = "import os\n\n\ndef read_lines(path):\n"
CHAT = [{"role": "user", "content": "def read_lines(path):"}]


def test_models(service: Service) -> None:
    assert [model.id for model in service.client.models.list()] == ["tiny-moe"]
    assert service.client.models.retrieve("tiny-moe").id == "tiny-moe"
    with pytest.raises(openai.NotFoundError):
        service.client.models.retrieve("other")


def test_completion_streamed_and_whole_are_the_same(service: Service) -> None:
    arguments = {"model": "tiny-moe", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    whole = service.client.completions.create(**arguments)
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 24
    chunks = list(service.client.completions.create(**arguments, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_chat_streamed_and_whole_are_the_same(service: Service) -> None:
    arguments = {"model": "tiny-moe", "messages": CHAT, "max_tokens": 24, "temperature": 0}
    whole = service.client.chat.completions.create(**arguments)
    chunks = list(
        service.client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_stop_ends_before_the_string(service: Service) -> None:
    arguments = {"model": "tiny-moe", "prompt": PROMPT, "max_tokens": 48, "temperature": 0}
    text = service.client.completions.create(**arguments, extra_body={"ignore_eos": True}).choices[0].text
    stop = text[len(text) // 2 :][:4]
    choice = service.client.completions.create(**arguments, stop=[stop], extra_body={"ignore_eos": True}).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.text == text.partition(stop)[0]


def test_logprobs_are_of_the_tokens_that_came(service: Service) -> None:
    choice = service.client.completions.create(
        model="tiny-moe", prompt=PROMPT, max_tokens=5, temperature=0, logprobs=3, extra_body={"ignore_eos": True}
    ).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.top_logprobs is not None
    assert "".join(choice.logprobs.tokens) == choice.text
    for logprob, top in zip(choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True):
        assert logprob is not None
        assert abs(logprob - max(top.values())) < 1e-6, "greedy takes the likeliest token"


def test_n_gives_as_many_choices_and_seed_repeats_them(service: Service) -> None:
    def sample(seed: int) -> list[str]:
        answer = service.client.completions.create(
            model="tiny-moe", prompt=PROMPT, max_tokens=12, temperature=1.0, n=3, seed=seed
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.text for choice in answer.choices]

    first = sample(7)
    assert len(set(first)) > 1, "three samples at temperature 1 differ"
    assert sample(7) == first


def test_requests_at_once_get_what_they_get_alone(service: Service) -> None:
    prompts = [f"def f{index}(x):\n" for index in range(5)]

    def complete(prompt: str) -> str:
        answer = service.client.completions.create(model="tiny-moe", prompt=prompt, max_tokens=16, temperature=0)
        return answer.choices[0].text

    alone = [complete(prompt) for prompt in prompts]
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(complete, prompts)) == alone


def test_tokenize_and_back(service: Service) -> None:
    body = {"model": "tiny-moe", "prompt": PROMPT, "add_special_tokens": False}
    tokens = service.post("/tokenize", body)["tokens"]
    assert len(tokens) > 1
    assert service.post("/detokenize", {"model": "tiny-moe", "tokens": tokens})["prompt"] == PROMPT
