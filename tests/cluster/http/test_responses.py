"""Answers of vLLM's app on their way out: errors in every shape become one, and nothing else is touched."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from cluster.http.errors import RefusedError
from cluster.http.requests import FOUND
from cluster.http.shape import Found
from tests.support.waiting import run_async

exceptions = pytest.importorskip("vllm.exceptions", reason="vLLM's errors")
engine_exceptions = pytest.importorskip("vllm.v1.engine.exceptions", reason="vLLM's errors")

from cluster.http.responses import INTERNAL, OneErrorFormat  # noqa: E402
from cluster.http.vllm_joints import EXPERTS_UNAVAILABLE  # noqa: E402

STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]
JSON = [(b"content-type", b"application/json"), (b"content-length", b"999"), (b"x-kept", b"1")]


class Answered:
    """What a client gets of an app that sends `messages` and then raises."""

    def __init__(
        self,
        *messages: Any,
        raised: BaseException | None = None,
        found: Found = Found(("prompt", "n")),  # noqa: B008
        path: str = "/v1/completions",
    ) -> None:
        self.sent: list[dict[str, Any]] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            for message in messages:
                await send(message)
            if raised is not None:
                raise raised

        async def send(message: Any) -> None:
            self.sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, FOUND: found}
        run_async(OneErrorFormat(app, 4)(scope, None, send))  # type: ignore[arg-type]

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])

    @property
    def error(self) -> dict[str, Any]:
        [_, body] = self.sent
        told = json.loads(body["body"])
        assert self.headers[b"content-length"] == str(len(body["body"])).encode()
        assert set(told["error"]) == {"message", "type", "param", "code"}
        return told["error"]


def start(status: int = 200, headers: Any = STREAM) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": headers}


def chunk(body: bytes | str, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body.encode() if isinstance(body, str) else body, "more_body": more}


def vllm_error(status: int, message: str, param: str | None = None) -> Any:
    error = {"message": message, "type": "BadRequestError", "param": param, "code": status}
    return chunk(json.dumps({"error": error}), more=False)


GOOD = [
    start(),
    chunk('data: {"choices": []}\n\n'),
    chunk('data: {"text": "data: {\\"error\\":"}\n\n'),
    chunk("", False),
]


def test_a_stream_passes_as_it_is() -> None:
    assert Answered(*GOOD).sent == GOOD


def test_a_stream_is_passed_on_chunk_by_chunk() -> None:
    """The start waits for the first chunk, and no chunk for another."""
    seen: list[int] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in GOOD:
            await send(message)
            seen.append(len(sent))

    async def send(message: Any) -> None:
        sent.append(message)

    run_async(OneErrorFormat(app, 4)({"type": "http", "method": "POST", "path": "/"}, None, send))  # type: ignore[arg-type]
    assert seen == [0, 2, 3, 4]


def test_a_whole_answer_passes_as_it_is() -> None:
    messages = [start(200, JSON), chunk('{"error": "a word in an answer"}', False)]
    assert Answered(*messages).sent == messages


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (
            400,
            {"error": {"message": "m (parameter=n, value=-2)", "type": "B", "param": "n", "code": 400}},
            (400, "m", "n", "invalid_value"),
        ),
        (
            400,
            {"error": {"message": "n must be at least 1, got 0.", "type": "B", "param": None, "code": 400}},
            (400, "n must be at least 1, got 0.", "n", "invalid_value"),
        ),
        (
            404,
            {"error": {"message": "The model `x` does not exist.", "type": "N", "param": "model", "code": 404}},
            (404, "The model `x` does not exist.", "model", "model_not_found"),
        ),
        (
            400,
            {
                "error": {
                    "message": "This model's maximum context length is 9 tokens.",
                    "type": "B",
                    "param": "input_text",
                    "code": 400,
                }
            },
            (400, "This model's maximum context length is 9 tokens.", "prompt", "context_length_exceeded"),
        ),
        (400, {"detail": "There was an error"}, (400, "There was an error", None, "invalid_value")),
        (
            400,
            {"type": "error", "error": {"type": "BadRequestError", "message": "no"}},
            (400, "no", None, "invalid_value"),
        ),
        (401, {"error": "Unauthorized"}, (401, "Unauthorized", None, "invalid_api_key")),
        (
            501,
            {"error": {"message": "not supported", "type": "NotImplementedError", "param": None, "code": 501}},
            (400, "not supported", None, "invalid_value"),
        ),
        (503, {"error": "The model is currently scaling."}, (503, "The model is currently scaling.", None, None)),
        (500, {"error": {"message": "secret", "type": "I", "param": None, "code": 500}}, (500, INTERNAL, None, None)),
        (
            400,
            {"error": {"message": "ours", "type": "invalid_request_error", "param": "p", "code": "invalid_json"}},
            (400, "ours", "p", "invalid_json"),
        ),
        (500, "Internal Server Error", (500, INTERNAL, None, None)),
        (400, "", (400, "the request is not valid", None, "invalid_value")),
    ],
)
def test_every_shape_of_an_error_becomes_openais(status: int, body: Any, expected: tuple[Any, ...]) -> None:
    text = body if isinstance(body, str) else json.dumps(body)
    answered = Answered(start(status, JSON), chunk(text[:5]), chunk(text[5:], False))
    error = answered.error
    assert (answered.status, error["message"], error["param"], error["code"]) == expected
    assert answered.headers[b"x-kept"] == b"1"
    assert answered.headers.get(b"retry-after") == (b"4" if expected[0] == 503 else None)


def test_a_stream_that_begins_with_an_error_is_no_stream() -> None:
    answered = Answered(
        start(), vllm_event(400, "token_id(s) [9] in logit_bias", "logit_bias"), chunk("data: [DONE]\n\n")
    )
    assert (answered.status, answered.error["param"]) == (400, "logit_bias")
    assert answered.headers[b"content-type"] == b"application/json"


def vllm_event(status: int, message: str, param: str | None = None) -> Any:
    error = {"message": message, "type": "BadRequestError", "param": param, "code": status}
    return chunk("data: " + json.dumps({"error": error}) + "\n\n")


def test_an_error_in_a_stream_is_an_event_in_the_same_format() -> None:
    token, event, done = chunk("data: {}\n\n"), vllm_event(500, "secret"), chunk("data: [DONE]\n\n", False)
    answered = Answered(start(), token, event, done)
    assert [answered.sent[0], answered.sent[1], answered.sent[3]] == [start(), token, done]
    told = json.loads(answered.sent[2]["body"].removeprefix(b"data: "))
    assert told == {"error": {"message": INTERNAL, "type": "server_error", "param": None, "code": None}}


def test_anthropics_clients_get_both_formats_in_one() -> None:
    path = "/v1/messages"
    event = chunk('event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"secret"}}\n\n')
    answered = Answered(start(), chunk("event: message_start\n\n"), event, path=path)
    name, data = answered.sent[2]["body"].decode().strip().split("\n")
    told = json.loads(data.removeprefix("data: "))
    assert (name, told["type"], told["error"]["message"]) == ("event: error", "error", INTERNAL)
    whole = Answered(start(400, JSON), vllm_error(400, "no"), path=path)
    assert json.loads(whole.sent[1]["body"]) == {"type": "error", "error": whole.error}
    raised = Answered(raised=ValueError("no"), path=path)
    assert json.loads(raised.sent[1]["body"]) == {"type": "error", "error": raised.error}


class PanicException(BaseException):
    """As pyo3 names it."""


def caused(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("raised", "status", "param", "code"),
    [
        (RefusedError("no", param="n", code="c", status=404), 404, "n", "c"),
        (exceptions.VLLMValidationError("no", parameter="n"), 400, "n", "invalid_value"),
        (exceptions.VLLMNotFoundError("The model `x` does not exist."), 404, "model", "model_not_found"),
        (exceptions.VLLMUnprocessableEntityError("no image there"), 422, None, None),
        (exceptions.QueueOverflowError(), 503, None, "queue_full"),
        (exceptions.RetryableRequestError(), 503, None, None),
        (exceptions.GenerationError(), 500, None, None),
        (engine_exceptions.EngineDeadError(), 503, None, None),
        (caused(engine_exceptions.EngineGenerateError(), engine_exceptions.EngineDeadError()), 503, None, None),
        (caused(engine_exceptions.EngineGenerateError(), KeyError("inside")), 500, None, None),
        (ValueError("`n` is odd"), 400, "n", "invalid_value"),
        (TypeError("no"), 400, None, "invalid_value"),
        (AttributeError("no"), 400, None, "invalid_value"),
        (RecursionError(), 400, None, "invalid_value"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), 400, None, "invalid_value"),
        (NotImplementedError("no beams"), 400, None, "invalid_value"),
        (Exception("of tokenizers"), 400, None, "invalid_value"),
        (PanicException("of a parser"), 400, None, "invalid_value"),
        (RuntimeError("ours"), 500, None, None),
        (OSError("disk"), 500, None, None),
        (MemoryError(), 500, None, None),
        (
            caused(RuntimeError("Caught handled exception, but response already started."), ValueError("x")),
            400,
            None,
            "invalid_value",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_whose_fault_an_exception_is(raised: BaseException, status: int, param: str | None, code: str | None) -> None:
    answered = Answered(raised=raised)
    assert (answered.status, answered.error["param"], answered.error["code"]) == (status, param, code)
    assert answered.error["message"]
    assert (b"retry-after" in answered.headers) == (status == 503)


def test_a_grammar_that_the_engine_cannot_compile_is_the_clients() -> None:
    found = Found(("prompt", "response_format"), has_grammar=True)
    for answered in (
        Answered(raised=exceptions.GenerationError(), found=found),
        Answered(start(), vllm_event(500, "Internal server error"), found=found),
        Answered(start(500, JSON), vllm_error(500, "Internal server error"), found=found),
    ):
        assert (answered.status, answered.error["param"]) == (400, "response_format")


def test_an_exception_in_a_stream_is_its_last_event() -> None:
    answered = Answered(start(), chunk("data: {}\n\n"), raised=engine_exceptions.EngineDeadError())
    body = answered.sent[2]["body"]
    assert body.endswith(b"data: [DONE]\n\n")
    assert not answered.sent[2]["more_body"]
    assert json.loads(body.removeprefix(b"data: ").partition(b"\n")[0])["error"]["type"] == "overloaded_error"


def test_an_exception_after_the_answer_does_not_answer_twice() -> None:
    whole = Answered(start(200, JSON), chunk('{"a": 1', True), raised=ValueError("late"))
    assert whole.sent[2:] == [chunk("", False)]
    refused = Answered(start(400, JSON), vllm_error(400, "no"), raised=ValueError("late"))
    assert (refused.status, refused.error["message"]) == (400, "no")
    replaced = Answered(start(), vllm_event(400, "no"), chunk("", False), raised=ValueError("late"))
    assert (replaced.status, replaced.error["message"]) == (400, "no")


@pytest.mark.parametrize("raised", [asyncio.CancelledError(), KeyboardInterrupt(), SystemExit()])
def test_what_ends_a_task_or_the_process_is_not_held_up(raised: BaseException) -> None:
    with pytest.raises(type(raised)):
        Answered(raised=raised)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages"])
def test_a_request_whose_experts_are_nowhere_may_be_sent_again(path: str) -> None:
    """As an exception, as an answer of vLLM's, as the first event of a stream, and after tokens that were right."""
    told = exceptions.RetryableRequestError(EXPERTS_UNAVAILABLE)
    error = {"message": EXPERTS_UNAVAILABLE, "type": "InternalServerError", "param": None, "code": 503}
    event = f"data: {json.dumps({'error': error})}\n\n"
    for answered in (
        Answered(raised=told, path=path),
        Answered(start(503, JSON), vllm_error(503, EXPERTS_UNAVAILABLE), path=path),
        Answered(start(), chunk(event), chunk("data: [DONE]\n\n", more=False), path=path),
    ):
        assert (answered.status, answered.headers[b"retry-after"]) == (503, b"4")
        body = json.loads(answered.sent[1]["body"])["error"]
        assert (body["code"], body["type"]) == ("experts_unavailable", "overloaded_error")
        assert body["message"] == EXPERTS_UNAVAILABLE
    streamed = Answered(
        start(), chunk('data: {"id": 1}\n\n'), chunk(event), chunk("data: [DONE]\n\n", more=False), path=path
    )
    assert streamed.status == 200
    last = streamed.sent[2]["body"]
    assert b'"code":"experts_unavailable"' in last
    assert b"InternalServerError" not in last
