"""The front door before vLLM and a real engine: routes, errors in OpenAI's words, streams, a neighbour in peace."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from benchmarks.serving.fuzz_http.campaign import Campaign
from benchmarks.serving.fuzz_http.wire import Answer, Connection, Request

MODEL = "tiny-moe"
GOOD: dict[str, Any] = {"model": MODEL, "prompt": "def", "max_tokens": 2}
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "def"}], "max_tokens": 2}
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}


def post(door: str, path: str, body: Any) -> Answer:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Connection(door).send(Request("POST", path, raw))


def get(door: str, path: str, method: str = "GET") -> Answer:
    return Connection(door).send(Request(method, path, headers=()))


@pytest.mark.parametrize(
    ("path", "change", "status", "param", "code"),
    [
        (COMPLETIONS, {"prompt": ""}, 400, "prompt", "invalid_value"),
        (COMPLETIONS, {"prompt": None}, 400, "prompt", "invalid_value"),
        (COMPLETIONS, {"prompt": []}, 400, "prompt", "invalid_value"),
        (COMPLETIONS, {"prompt": [[]]}, 400, "prompt", "invalid_value"),
        (COMPLETIONS, {"prompt": [999_999]}, 400, "prompt", "invalid_value"),
        (COMPLETIONS, {"prompt": "def " * 1000}, 400, "prompt", "context_length_exceeded"),
        (COMPLETIONS, {"prompt": [5] * 1000}, 400, "prompt", "context_length_exceeded"),
        (COMPLETIONS, {"prompt": "\ud800"}, 400, None, "invalid_unicode"),
        (COMPLETIONS, {"stop": "\ud800"}, 400, None, "invalid_unicode"),
        (COMPLETIONS, {"logprobs": -2}, 400, "logprobs", "invalid_value"),
        (COMPLETIONS, {"logprobs": 10**6}, 400, "logprobs", "invalid_value"),
        (COMPLETIONS, {"prompt": [5] * 200, "prompt_logprobs": 20}, 400, "prompt_logprobs", "invalid_value"),
        (COMPLETIONS, {"max_tokens": -1}, 400, "max_tokens", "invalid_value"),
        (COMPLETIONS, {"max_tokens": "many"}, 400, "max_tokens", "invalid_type"),
        (COMPLETIONS, {"max_tokens": 10**6}, 400, "max_tokens", "invalid_value"),
        (COMPLETIONS, {"n": 0}, 400, "n", "invalid_value"),
        (COMPLETIONS, {"n": 10**6}, 400, "n", "integer_above_max_value"),
        (COMPLETIONS, {"temperature": -1}, 400, "temperature", "invalid_value"),
        (COMPLETIONS, {"logit_bias": {"999999": 1}}, 400, "logit_bias", "invalid_value"),
        (COMPLETIONS, {"structured_outputs": {"regex": "("}}, 400, None, "invalid_value"),
        (COMPLETIONS, {"structured_outputs": "x"}, 400, "structured_outputs", "invalid_type"),
        (COMPLETIONS, {"model": "other"}, 404, "model", "model_not_found"),
        (COMPLETIONS, {"stream_interval": 0}, 400, "stream_interval", "integer_below_min_value"),
        (CHATS, {"messages": "hello"}, 400, "messages", "invalid_type"),
        (CHATS, {"messages": []}, 400, "messages", "invalid_value"),
        (CHATS, {"messages": [{"content": "x"}]}, 400, "messages[0].role", "missing_required_parameter"),
        (CHATS, {"messages": [{"role": "king", "content": "x"}]}, 400, None, "invalid_value"),
        (CHATS, {"messages": [{"role": "user", "content": "def " * 1000}]}, 400, "messages", "context_length_exceeded"),
        (CHATS, {"response_format": SCHEMA}, 400, None, "invalid_value"),
        (CHATS, {"response_format": {"type": "x"}}, 400, "response_format.type", "invalid_value"),
        (CHATS, {"tools": [{"type": "function"}]}, 400, "tools[0].function", "missing_required_parameter"),
        (CHATS, {"model": "tiny-moe:x"}, 404, "model", "model_not_found"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_mistakes_are_told_in_openais_words_streamed_or_not(
    door: str, path: str, change: dict[str, Any], status: int, param: str | None, code: str, stream: bool
) -> None:
    body = {**(GOOD if path == COMPLETIONS else CHAT), **change}
    if stream and "prompt_logprobs" not in change:
        body["stream"] = True
    answer = post(door, path, body)
    assert answer.status == status, answer.body
    assert list(answer.problems(Request("POST", path))) == []
    error = json.loads(answer.body)["error"]
    assert (error["param"], error["code"]) == (param, code), error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("POST", "/scale_elastic_ep", 404, "unknown_url"),
        ("POST", "/inference/v1/generate", 404, "unknown_url"),
        ("POST", "/v1/load_lora_adapter", 404, "unknown_url"),
        ("POST", "/invocations", 404, "unknown_url"),
    ],
)
def test_paths_that_are_not_there_for_clients(door: str, method: str, path: str, status: int, code: str) -> None:
    answer = get(door, path, method)
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (status, code)


@pytest.mark.parametrize("path", ["/health", "/ready", "/live", "/metrics", "/docs", "/openapi.json", "/v1/models"])
def test_paths_that_are(door: str, path: str) -> None:
    assert get(door, path).status == 200


def test_refusals_are_counted_where_vllm_counts(door: str) -> None:
    def counted(status: str) -> float:
        lines = get(door, "/metrics").body.decode().splitlines()
        named = [line for line in lines if line.startswith("http_requests_total") and f'status="{status}"' in line]
        return sum(float(line.split()[-1]) for line in named)

    before = counted("4xx")
    assert post(door, COMPLETIONS, b"{").status == 400
    assert counted("4xx") == before + 1
    assert counted("5xx") == 0


def test_the_openai_package_finds_its_way(door: str) -> None:
    client = openai.OpenAI(base_url=f"{door}/v1", api_key="none", max_retries=0)
    assert client.models.retrieve(MODEL).id == MODEL
    whole = client.completions.create(model=MODEL, prompt="def", max_tokens=8, temperature=0).choices[0].text
    chunks = client.completions.create(model=MODEL, prompt="def", max_tokens=8, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    with pytest.raises(openai.BadRequestError) as found:
        client.completions.create(model=MODEL, prompt="def", logit_bias={"999999": 1}, stream=True)
    assert (found.value.param, found.value.code) == ("logit_bias", "invalid_value")


def test_a_refused_request_leaves_nothing_behind(door: str) -> None:
    """A value that the engine's process cannot be sent would otherwise count as unfinished for ever."""

    def running() -> int:
        metrics = get(door, "/metrics").body.decode().splitlines()
        return sum(float(line.split()[-1]) for line in metrics if line.startswith("vllm:num_requests_"))

    for _ in range(3):
        answer = post(door, COMPLETIONS, {**GOOD, "stop": ["x" * 10**5], "seed": 2**63 - 1, "top_k": 2**63 - 1})
        assert answer.status in (200, 400)
    assert post(door, COMPLETIONS, GOOD).status == 200
    assert running() == 0


def test_bodies_that_would_hold_up_the_event_loop_are_refused_at_once(door: str) -> None:
    """Each of these took vLLM 2 to 100 s, and in most of them nobody else got a token."""
    for path, body in (
        (CHATS, {**CHAT, "messages": [1] * 100_000}),
        (COMPLETIONS, {**GOOD, "prompt": [-1] * 100_000}),
        ("/v1/responses", {"model": MODEL, "input": [{}] * 4096}),
        (COMPLETIONS, {**GOOD, "structured_outputs": {"choice": [f"x{i}" for i in range(100_000)]}}),
        (COMPLETIONS, {**GOOD, "n": 16_000, "temperature": 1}),
        ("/tokenize", {"model": MODEL, "prompt": "def foo " * 100_000}),
    ):
        answer = post(door, path, body)
        assert answer.status == 400, answer.body
        assert json.loads(answer.body)["error"]["code"] in (
            *("array_above_max_length", "integer_above_max_value", "integer_below_min_value", "invalid_value"),
            "context_length_exceeded",
        )


def test_odd_requests_get_no_5xx_and_a_neighbour_its_tokens(door: str) -> None:
    """The short form of `python -m benchmarks.serving.fuzz_http`."""
    campaign = Campaign(door)
    campaign.run(300, seed=7)
    report = campaign.report()
    assert campaign.failures == [], report
    assert report["neighbour_changed"] == []
    assert report["neighbour_streams"] >= 1
    assert sum(campaign.statuses.values()) >= 290
    assert campaign.statuses[200] > 10, "some of the requests are good"
    assert campaign.statuses[400] > 100, "and many are not"
