"""What clients do wrong: told in OpenAI's format, and the server lives on."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import openai
import psutil
import pytest

from tests.support.serve.service import API_KEY, Service
from tests.support.waiting import wait_for

GOOD = {"model": "tiny-moe", "prompt": "def", "max_tokens": 2}


def post(service: Service, body: bytes, path: str = "/v1/completions") -> tuple[int, dict[str, Any], dict[str, str]]:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {API_KEY}"}
    request = urllib.request.Request(service.url + path, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response), dict(response.headers)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), dict(error.headers)


@pytest.mark.parametrize(
    ("change", "status", "told"),
    [
        ({"max_tokens": -5}, 400, "max_tokens must be at least 1, got -5"),
        ({"prompt": "def " * 3000}, 400, "maximum context length is 1024"),
        ({"prompt": [999_999_999]}, 400, ""),
        ({"temperature": -1}, 400, "temperature must be non-negative"),
        ({"max_tokens": "many"}, 400, "max_tokens: Input should be a valid integer"),
        ({"model": "other"}, 404, "The model `other` does not exist"),
        ({"model": "tiny-moe:x"}, 404, "The model `tiny-moe:x` does not exist"),
        ({"n": 0}, 400, "n must be at least 1"),
        ({"prompt": ""}, 400, "non-empty"),
        ({"logprobs": -2}, 400, "logprobs"),
        ({"prompt": "\ud800"}, 400, "lone surrogate"),
        ({"stop": "\ud800"}, 400, "lone surrogate"),
        ({"logit_bias": {"999999": 1}, "stream": True}, 400, "out-of-vocab"),
        ({"temperature": -1, "stream": True}, 400, "temperature must be non-negative"),
    ],
)
def test_bad_values(service: Service, change: dict[str, Any], status: int, told: str) -> None:
    code, body, _ = post(service, json.dumps({**GOOD, **change}).encode())
    assert code == status, body
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert told in body["error"]["message"]
    assert post(service, json.dumps(GOOD).encode())[0] == 200, "the server lives on"


@pytest.mark.parametrize("body", [b"{", b"", b"[1, 2]", b'"text"', b"\xff\xfe"])
def test_bodies_that_are_no_request(service: Service, body: bytes) -> None:
    code, answer, _ = post(service, body)
    assert code == 400, answer
    assert answer["error"]["type"] == "invalid_request_error"


def test_chat_with_bad_messages(service: Service) -> None:
    code, answer, _ = post(service, b'{"model": "tiny-moe", "messages": "hello"}', "/v1/chat/completions")
    assert (code, answer["error"]["param"]) == (400, "messages")


def test_unknown_paths(service: Service) -> None:
    code, body = service.get("/v1/nothing")
    assert code == 404
    assert json.loads(body)["error"]["code"] == "unknown_url"


def test_an_error_of_one_client_keeps_nobody_waiting(service: Service) -> None:
    """Exceptions of Ray Serve LLM stay in the ingress: Serve's proxy would import vllm to read one."""

    raylet = psutil.Process(service.shards()[0]["pid"]).parent()
    assert raylet is not None
    [proxy] = [process for process in raylet.children() if "ProxyActor" in " ".join(process.cmdline())]
    with pytest.raises(openai.NotFoundError):
        service.client.models.retrieve("other")
    assert post(service, json.dumps({**GOOD, "model": "other"}).encode())[0] == 404
    assert post(service, json.dumps(GOOD).encode())[0] == 200
    assert not any("libtorch" in mapped.path for mapped in proxy.memory_maps()), "the proxy has imported torch"


def test_wrong_key_is_401_and_health_needs_none(service: Service) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        service.openai_client("wrong").models.list()
    assert caught.value.code == "invalid_api_key"
    with urllib.request.urlopen(service.url + "/health", timeout=60) as response:
        assert response.status == 200


def test_over_the_queue_limit_is_503_with_retry_after_and_slots_come_back(service: Service) -> None:
    """Six may be pending: six streams are held open, a seventh is refused, and hanging up makes room again."""
    streams = [
        service.client.completions.create(
            model="tiny-moe", prompt=f"{index}", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
        )
        for index in range(6)
    ]
    for stream in streams:
        next(iter(stream))
    code, body, headers = post(service, json.dumps(GOOD).encode())
    assert (code, body["error"]["code"], headers["retry-after"]) == (503, "queue_full", "2")
    for stream in streams:
        stream.close()
    wait_for(lambda: post(service, json.dumps(GOOD).encode())[0] == 200, 30, "room after the streams were closed")


def test_a_client_that_hangs_up_frees_its_slot_in_the_engine(service: Service) -> None:
    def unfinished() -> int:
        return sum(router["unfinished_requests"] for router in service.status()["routers"])

    wait_for(lambda: unfinished() == 0, 30, "an idle engine")
    stream = service.client.completions.create(
        model="tiny-moe", prompt="def", max_tokens=1000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert unfinished() == 1
    stream.close()
    wait_for(lambda: unfinished() == 0, 30, "the engine to drop the request")
