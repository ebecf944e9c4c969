"""Completions and chats over HTTP, with the experts on shards: what a request may ask for."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.support.model_api import ModelApi

PROMPT = "import os\nimport sys\n\n\ndef main("
CHAT: list[Any] = [{"role": "user", "content": "Document the function os.path.join"}]


def check_usage(streamed: Any, whole: Any) -> None:
    """Equal but for details, which tell what was cached."""
    assert streamed.prompt_tokens == whole.prompt_tokens > 0
    assert streamed.completion_tokens == whole.completion_tokens > 0
    assert streamed.total_tokens == whole.total_tokens == whole.prompt_tokens + whole.completion_tokens


def test_a_streamed_chat_is_the_whole_one_with_its_usage(api: ModelApi) -> None:
    asked: dict[str, Any] = {"model": api.model, "messages": CHAT, "max_tokens": 12, "temperature": 0}
    whole = api.client.chat.completions.create(**asked)
    chunks = list(api.client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == whole.choices[0].message.content
    check_usage(chunks[-1].usage, whole.usage)


def test_a_streamed_completion_is_the_whole_one_with_its_usage(api: ModelApi) -> None:
    asked: dict[str, Any] = {"model": api.model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    whole = api.client.completions.create(**asked)
    chunks = list(api.client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    check_usage(chunks[-1].usage, whole.usage)


def test_logprobs_are_of_the_likeliest_tokens(api: ModelApi) -> None:
    answer = api.client.completions.create(
        model=api.model, prompt=PROMPT, max_tokens=6, temperature=0, logprobs=3, extra_body={"ignore_eos": True}
    )
    found: Any = answer.choices[0].logprobs
    assert len(found.token_logprobs) == 6
    for logprob, top in zip(found.token_logprobs, found.top_logprobs, strict=True):
        assert logprob == max(top.values())
        assert len(top) == 3


def test_prompt_logprobs_tell_how_likely_the_prompt_is(api: ModelApi) -> None:
    """And are the same as those of an echo."""
    body = {"prompt": PROMPT, "max_tokens": 1, "temperature": 0}
    told = api.post("/v1/completions", **body, prompt_logprobs=0)["choices"][0]["prompt_logprobs"]
    echoed = api.post("/v1/completions", **body, logprobs=0, echo=True)["choices"][0]
    assert told[0] is echoed["logprobs"]["token_logprobs"][0] is None
    of_prompt = [next(iter(each.values()))["logprob"] for each in told[1:]]
    assert len(of_prompt) > 5
    for one, other in zip(of_prompt, echoed["logprobs"]["token_logprobs"][1:], strict=False):
        assert math.isclose(one, other, abs_tol=1e-4), "float32 sums of other batches"
    assert echoed["text"].startswith(PROMPT)


def test_n_choices_differ_and_their_seed_repeats_them(api: ModelApi) -> None:
    def sampled(seed: int) -> list[str]:
        answer = api.client.completions.create(
            model=api.model, prompt=PROMPT, max_tokens=8, temperature=1, n=3, seed=seed
        )
        return [choice.text for choice in answer.choices]

    first = sampled(5)
    assert len(set(first)) > 1
    assert sampled(5) == first


def test_stop_strings_end_an_answer_and_min_tokens_holds_them_off(api: ModelApi) -> None:
    body = {"prompt": PROMPT, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    text = api.post("/v1/completions", **body)["choices"][0]["text"]
    stop = text.strip()[:1]
    stopped = api.post("/v1/completions", **body, stop=[stop])["choices"][0]
    assert (stopped["finish_reason"], stopped["text"]) == ("stop", text.partition(stop)[0])
    answer = api.post("/v1/completions", **body, stop=[stop], min_tokens=10)
    assert answer["usage"]["completion_tokens"] >= 10


def test_logit_bias_forces_a_token(api: ModelApi) -> None:
    assert api.tokens(PROMPT, 3, logit_bias={"100": 100}) == [100] * 3
    assert 100 not in api.tokens(PROMPT, 3)


def test_a_beam_holds_as_many_answers_as_asked(api: ModelApi) -> None:
    answer = api.post("/v1/completions", prompt=PROMPT, max_tokens=4, n=2, use_beam_search=True)
    assert len({choice["text"] for choice in answer["choices"]}) == 2


@pytest.mark.parametrize(
    ("field", "value", "code", "message"),
    [
        ("best_of", 4, "unsupported_parameter", "best_of has no effect in this version of vLLM: send n"),
        ("guided_regex", "[ab]", "unsupported_parameter", "guided_regex has no effect in this version of vLLM"),
        ("suffix", "x", "invalid_value", "suffix is only supported for models with FIM completion rendering"),
    ],
)
def test_a_field_that_would_do_nothing_is_refused(
    api: ModelApi, field: str, value: Any, code: str, message: str
) -> None:
    status, error = api.refused("/v1/completions", prompt=PROMPT, max_tokens=2, **{field: value})
    assert (status, error["param"], error["code"]) == (400, field, code)
    assert error["message"].startswith(message)


def test_best_of_that_asks_for_nothing_more_is_taken(api: ModelApi) -> None:
    assert len(api.post("/v1/completions", prompt=PROMPT, max_tokens=2, n=2, best_of=2)["choices"]) == 2
