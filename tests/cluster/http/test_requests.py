"""The body of a request on its way to vLLM: read once, handed on whole, refused when it is too large or no JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.http.requests import DRAINED, BodyCheck, found_in
from tests.support.waiting import run_async

JSON = [(b"content-type", b"application/json")]


class Passed:
    """One request through the check: what the app got, and what the client was told."""

    def __init__(
        self, chunks: list[bytes], headers: list[tuple[bytes, bytes]] = JSON, hangs_up: bool = False, **scope: Any
    ) -> None:
        self.got: bytes | None = None
        self.after: dict[str, Any] = {}
        self.read = 0
        self._chunks, self._hangs_up = chunks, hangs_up
        self._sent: list[dict[str, Any]] = []
        self.scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, **scope}
        check = BodyCheck(self._app, max_body_bytes=100, max_sequences=3, max_model_len=1)
        run_async(check(self.scope, self._receive, self._send))

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        assert not message.get("more_body", False)
        self.got = message.get("body")
        self.after = await receive()

    async def _receive(self) -> dict[str, Any]:
        if self.read == len(self._chunks):
            return {"type": "http.disconnect"}
        self.read += 1
        more = self.read < len(self._chunks) or self._hangs_up
        return {"type": "http.request", "body": self._chunks[self.read - 1], "more_body": more}

    async def _send(self, message: Any) -> None:
        self._sent.append(message)

    @property
    def refusal(self) -> tuple[int, str | None, str | None]:
        """(status, param, code)"""
        assert self.got is None
        error = json.loads(self._sent[1]["body"])["error"]
        return self._sent[0]["status"], error["param"], error["code"]


@pytest.mark.parametrize("chunks", [[b'{"prompt": "a"}'], [b'{"pro', b"", b'mpt": "a"}'], [b'{"prompt": "a"}', b""]])
def test_a_body_arrives_in_one_piece_and_then_what_comes_after_it(chunks: list[bytes]) -> None:
    passed = Passed(chunks)
    assert passed.got == b'{"prompt": "a"}'
    assert passed.after == {"type": "http.disconnect"}
    assert found_in(passed.scope).fields == ("prompt",)


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_what_has_no_body_is_not_read(method: str) -> None:
    passed = Passed([b"not json"], method=method)
    assert passed.got == b"not json"
    assert found_in(passed.scope).fields == ()


@pytest.mark.parametrize(
    "headers", [[], [(b"content-type", b"text/plain")], [(b"content-type", b"multipart/form-data")]]
)
def test_only_json_is_read_as_json(headers: list[tuple[bytes, bytes]]) -> None:
    assert Passed([b"not json"], headers).got == b"not json"


@pytest.mark.parametrize("kind", [b"application/json", b"Application/JSON ; charset=utf-8"])
def test_json_is_checked_however_it_is_announced(kind: bytes) -> None:
    assert Passed([b"not json"], [(b"content-type", kind)]).refusal == (400, None, "invalid_json")
    assert Passed([b'{"n": 4}'], [(b"content-type", kind)]).refusal == (400, "n", "integer_above_max_value")


def test_an_empty_body_is_left_to_vllm() -> None:
    assert Passed([b""]).got == b""


def test_the_largest_body_passes_and_a_larger_one_is_413() -> None:
    largest = b'"' + b"x" * 98 + b'"'
    assert Passed([largest]).got == largest
    for chunks in ([largest + b" "], [largest, b" "], [b"x" * 60, b"x" * 60, b"x" * 60]):
        too_large = Passed(chunks)
        assert too_large.refusal == (413, None, "request_too_large")
        assert too_large.read == len(chunks), "the client can send it all before it reads the answer"


def test_of_a_body_without_end_only_so_much_is_read() -> None:
    endless = Passed([b"x" * 100] * 1000)
    assert endless.refusal[0] == 413
    assert endless.read == DRAINED + 1
    announced = Passed([b"x"] * 1000, [*JSON, (b"content-length", b"999999")])
    assert announced.refusal[0] == 413
    assert announced.read == 1


def test_a_client_that_hangs_up_half_way_is_not_answered() -> None:
    gone = Passed([b'{"prompt'], hangs_up=True)
    assert (gone.got, gone._sent) == (None, [])


@pytest.mark.parametrize("name", [b"x-vllm-priority", b"x-data-parallel-rank"])
def test_numbers_in_headers_have_64_bits_too(name: bytes) -> None:
    assert Passed([b"{}"], [*JSON, (name, b"9" * 18)]).got == b"{}"
    assert Passed([b"{}"], [*JSON, (name, b"9" * 19)]).refusal[0] == 400


def test_text_to_tokenize_is_compared_with_the_context() -> None:
    body = json.dumps({"prompt": "x" * 64}).encode()
    assert Passed([body]).got == body
    for path in ("/tokenize", "/v1/messages/count_tokens"):
        assert Passed([body], path=path).refusal == (400, None, "context_length_exceeded")


def test_what_is_no_request_passes() -> None:
    passed = Passed([b"x"], type="websocket")
    assert passed.got == b"x"
