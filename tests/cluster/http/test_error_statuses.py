"""Status, body and headers of every kind of error, each in full."""

from __future__ import annotations

import asyncio
import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, ValidationError, field_validator
from ray.exceptions import RayError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from cluster.http.errors import (
    MAX_MESSAGE,
    ErrorsStayInside,
    OpenAIApp,
    RefusedError,
    UnavailableError,
    add_error_handlers,
    error_body,
    error_response,
    response_for,
)


def told(response: JSONResponse) -> tuple[int, dict[str, Any], str | None]:
    """(status, the error, the Retry-After header)."""
    body = json.loads(bytes(response.body))
    assert list(body) == ["error"]
    return response.status_code, body["error"], response.headers.get("retry-after")


def error(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"message": message, "type": kind, "param": param, "code": code}


def ray_error(cause: Any) -> RayError:
    found = RayError("died at 10.0.0.1")
    found.cause = cause
    return found


AGAIN = "overloaded_error"
ROUTER_FAILED = error("the router that had this request failed; try again", AGAIN)


@pytest.mark.parametrize(
    ("raised", "status", "expected", "retry"),
    [
        (BackPressureError(3, 2), 503, error("too many requests are queued; try again", AGAIN), "4"),
        (
            DeploymentUnavailableError(DeploymentID("Router", "llm")),
            503,
            error("no router is available; try again", AGAIN),
            "4",
        ),
        (TimeoutError(), 503, error("no answer in time; try again", AGAIN), "4"),
        (TimeoutError("in words of its own"), 503, error("no answer in time; try again", AGAIN), "4"),
        (UnavailableError("router a is away"), 503, error("router a is away", AGAIN), "4"),
        (
            RefusedError("no", param="n", code="c", status=413),
            413,
            error("no", "invalid_request_error", "n", "c"),
            None,
        ),
        (HTTPException(404, "no model x"), 404, error("no model x", "invalid_request_error", code="not_found"), None),
        (HTTPException(408, "too late"), 408, error("too late", "invalid_request_error"), None),
        (HTTPException(422, "no"), 422, error("no", "invalid_request_error"), None),
        (ray_error(None), 503, ROUTER_FAILED, "4"),
        (ray_error(KeyError("inside")), 503, ROUTER_FAILED, "4"),
        (ray_error(ValueError("prompt is long")), 400, error("prompt is long", "invalid_request_error"), None),
        (ray_error(BackPressureError(3, 2)), 503, error("too many requests are queued; try again", AGAIN), "4"),
        (ValueError("top_p is 7"), 400, error("top_p is 7", "invalid_request_error"), None),
        (
            KeyError("inside"),
            500,
            error("internal error; see the log of the replica that answered", "server_error"),
            None,
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_exception_has_one_answer(
    raised: BaseException, status: int, expected: dict[str, Any], retry: str | None
) -> None:
    assert told(response_for(raised, 4)) == (status, expected, retry)


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (400, "invalid_request_error", None),
        (401, "invalid_request_error", "invalid_api_key"),
        (404, "invalid_request_error", "not_found"),
        (405, "invalid_request_error", "method_not_allowed"),
        (403, "invalid_request_error", "forbidden"),
        (413, "invalid_request_error", "request_too_large"),
        (415, "invalid_request_error", "unsupported_media_type"),
        (499, "invalid_request_error", None),
        (500, "server_error", None),
        (501, "server_error", None),
        (503, "overloaded_error", None),
    ],
)
def test_the_type_and_the_code_follow_the_status(status: int, kind: str, code: str | None) -> None:
    assert error_body(status, "m") == {"error": error("m", kind, None, code)}
    assert error_body(status, "m", "top_k", "mine") == {"error": error("m", kind, "top_k", "mine")}


def test_a_response_has_the_header_only_where_it_is_asked_for() -> None:
    assert told(error_response(503, "m", param="p", code="c", retry_after_s=0))[1:] == (
        error("m", AGAIN, "p", "c"),
        "0",
    )
    assert told(error_response(503, "m"))[2] is None


class Inner(BaseModel):
    n: int = Field(ge=0)


class Outer(BaseModel):
    inner: list[Inner] = []
    name: str = "a"

    @field_validator("name")
    @classmethod
    def _short(cls, name: str) -> str:
        if len(name) > 3:
            raise ValueError("name has more than 3 letters")
        return name


def validation_error(**values: Any) -> ValidationError:
    with pytest.raises(ValidationError) as found:
        Outer(**values)
    return found.value


@pytest.mark.parametrize(
    ("raised", "message", "param", "code"),
    [
        (
            validation_error(inner=[{"n": 1}, {"n": -1}]),
            "inner[1].n: Input should be greater than or equal to 0",
            "inner[1].n",
            "integer_below_min_value",
        ),
        (validation_error(name="long"), "name: name has more than 3 letters", "name", "invalid_value"),
        (
            RequestValidationError([{"loc": ("body",), "msg": "Field required", "type": "missing"}]),
            "Field required",
            None,
            "missing_required_parameter",
        ),
        (
            RequestValidationError([{"loc": ("body", "a"), "msg": "wrong", "type": "int_type"}]),
            "a: wrong",
            "a",
            "invalid_type",
        ),
        (
            RequestValidationError([{"loc": ("query", "a"), "msg": "wrong"}, {"loc": (), "msg": "2"}]),
            "a: wrong",
            "a",
            "invalid_value",
        ),
        (
            RequestValidationError(
                [
                    {
                        "loc": ("body", "stop", "list[constrained-str]", 0, "str", "TextPart"),
                        "msg": "no",
                        "type": "too_long",
                    }
                ]
            ),
            "stop[0]: no",
            "stop[0]",
            "array_above_max_length",
        ),
        (RequestValidationError([]), "invalid request", None, None),
    ],
)
def test_a_bad_parameter_is_named_with_its_place(
    raised: BaseException, message: str, param: str | None, code: str | None
) -> None:
    expected = error(message, "invalid_request_error", param, code)
    assert told(response_for(raised, 4)) == (400, expected, None)


def test_a_wrong_content_type_in_vllms_words_is_415() -> None:
    message = "Unsupported Media Type: Only 'application/json' is allowed"
    expected = error(message, "invalid_request_error", code="unsupported_media_type")
    assert told(response_for(RequestValidationError([message]), 4)) == (415, expected, None)


def test_a_message_that_repeats_the_request_is_cut() -> None:
    message = error_body(400, "x" * 10**6)["error"]["message"]
    assert message == "x" * MAX_MESSAGE + "..."


def test_what_is_no_json_is_told_as_the_parser_says_it() -> None:
    raised = RequestValidationError(
        [{"type": "json_invalid", "loc": ("body", 3), "msg": "m", "ctx": {"error": "Expecting value"}}]
    )
    expected = error("the request body is not JSON: Expecting value", "invalid_request_error", code="invalid_json")
    assert told(response_for(raised, 4)) == (400, expected, None)


@pytest.mark.parametrize("raised", [KeyError("inside"), ray_error(None)])
def test_what_clients_are_not_told_is_in_the_log(raised: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "ray.serve"):
        response_for(raised, 4)
    assert len(caplog.records) == 1
    response_for(ValueError("the client's fault"), 4)
    assert len(caplog.records) == 1


def test_serves_own_handlers_are_kept_out_and_others_are_not() -> None:
    app = OpenAIApp()

    def handler(*_: Any) -> None: ...

    for kind in (BackPressureError, DeploymentUnavailableError, KeyError, 418):
        app.add_exception_handler(kind, handler)
    assert {BackPressureError, DeploymentUnavailableError, KeyError, 418} & set(app.exception_handlers) == {
        KeyError,
        418,
    }
    assert app.exception_handlers[KeyError] is handler


def test_an_app_answers_what_the_framework_itself_raises_in_this_format() -> None:
    app = OpenAIApp()
    add_error_handlers(app, 4)
    for kind in (RequestValidationError, HTTPException):
        response = asyncio.run(app.exception_handlers[kind](SimpleNamespace(), HTTPException(404, "gone")))
        assert told(response)[:2] == (404, error("gone", "invalid_request_error", code="not_found"))
    assert [middleware.cls for middleware in app.user_middleware] == [ErrorsStayInside]
    assert app.user_middleware[0].kwargs == {"retry_after_s": 4}


def through(scope_type: str, chunks: list[dict[str, Any]], raised: Exception | None) -> list[dict[str, Any]]:
    """What a client gets of an app that sends `chunks` and then raises."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert receive == "receive"
        for chunk in chunks:
            await send(chunk)
        if raised is not None:
            raise raised

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(ErrorsStayInside(app, 4)({"type": scope_type}, "receive", send))  # type: ignore[arg-type]
    return sent


START = {"type": "http.response.start", "status": 200, "headers": []}
CHUNK = {"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True}


def test_what_goes_well_passes_as_it_is() -> None:
    assert through("http", [START, CHUNK], None) == [START, CHUNK]


def test_an_error_before_the_start_is_a_response_of_its_own() -> None:
    first, body = through("http", [], TimeoutError())
    assert (first["type"], first["status"]) == ("http.response.start", 503)
    assert dict(first["headers"])[b"retry-after"] == b"4"
    assert json.loads(body["body"]) == error_body(503, "no answer in time; try again")


@pytest.mark.parametrize("before", [[START], [START, CHUNK], [START, CHUNK, CHUNK]])
def test_an_error_after_the_start_is_the_last_event_of_the_stream(before: list[dict[str, Any]]) -> None:
    *passed, last = through("http", before, ValueError("chunk 2 is missing"))
    assert passed == before
    text = json.dumps(error_body(400, "chunk 2 is missing"), separators=(",", ":"))
    body = f"data: {text}\n\ndata: [DONE]\n\n".encode()
    assert last == {"type": "http.response.body", "body": body, "more_body": False}


def test_what_is_no_request_fails_as_it_would_without() -> None:
    with pytest.raises(ValueError, match="of the app"):
        through("websocket", [], ValueError("of the app"))
