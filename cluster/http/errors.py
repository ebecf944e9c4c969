"""Every error that a client sees, in OpenAI's format: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("ray.serve")

MAX_MESSAGE = 1000  # characters; a longer one repeats what the client sent

_CODES = {
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_media_type",
}
# What pydantic found, in OpenAI's words.
_VALIDATION_CODES = {
    "missing": "missing_required_parameter",
    "greater_than": "integer_below_min_value",
    "greater_than_equal": "integer_below_min_value",
    "less_than": "integer_above_max_value",
    "less_than_equal": "integer_above_max_value",
    "too_long": "array_above_max_length",
    "too_short": "array_below_min_length",
    "string_too_long": "string_above_max_length",
    "string_too_short": "string_below_min_length",
}


# Parts of the place of a finding that are no names of fields.
_NO_FIELDS = frozenset({"body", "str", "int", "float", "bool", "bytes", "list", "dict", "none", "constrained"})


class UnavailableError(RuntimeError):
    """What the answer needs is away for now; the client sees the message with status 503."""


class RefusedError(ValueError):
    """A request that the client has to change; the fields are those of the answer."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None, kind: str | None = None
) -> dict[str, Any]:
    """The body of one error. `type` (`kind`) and `code` follow from the status if they are None."""
    kind = kind or (
        "invalid_request_error" if status < 500 else "overloaded_error" if status == 503 else "server_error"
    )
    if len(message) > MAX_MESSAGE:
        message = message[:MAX_MESSAGE] + "..."
    return {"error": {"message": message, "type": kind, "param": param, "code": code or _CODES.get(status)}}


def error_response(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    retry_after_s: int | None = None,
    kind: str | None = None,
) -> JSONResponse:
    """One error as a response; `retry_after_s` becomes the Retry-After header."""
    headers = None if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    return JSONResponse(error_body(status, message, param, code, kind), status_code=status, headers=headers)


def response_for(error: BaseException, retry_after_s: int) -> JSONResponse:
    """The response to any exception. An unexpected one is logged, and the client does not see its details."""
    if isinstance(error, RequestValidationError):
        return error_response(**validation_fields(map(_without_origin, error.errors())))
    if isinstance(error, ValidationError):
        return error_response(**validation_fields(error.errors()))
    if isinstance(error, RefusedError):
        return error_response(error.status, error.message, error.param, error.code)
    if isinstance(error, BackPressureError):
        return error_response(503, "too many requests are queued; try again", retry_after_s=retry_after_s)
    if isinstance(error, DeploymentUnavailableError):
        return error_response(503, "no router is available; try again", retry_after_s=retry_after_s)
    if isinstance(error, UnavailableError):
        return error_response(503, str(error), retry_after_s=retry_after_s)
    if isinstance(error, TimeoutError):
        return error_response(503, "no answer in time; try again", retry_after_s=retry_after_s)
    if isinstance(error, HTTPException):
        return error_response(error.status_code, str(error.detail))
    if isinstance(error, RayError):
        cause = getattr(error, "cause", None)
        if isinstance(cause, ValueError | BackPressureError):
            return response_for(cause, retry_after_s)
        logger.error("a router failed under a request: %r", error)
        return error_response(503, "the router that had this request failed; try again", retry_after_s=retry_after_s)
    if isinstance(error, ValueError):
        return error_response(400, str(error))
    logger.error("unexpected error under a request", exc_info=error)
    return error_response(500, "internal error; see the log of the replica that answered")


def validation_fields(errors: Iterable[Any]) -> dict[str, Any]:
    """Arguments of `error_response` for what pydantic or FastAPI found wrong; the first finding is told."""
    first = next(iter(errors), None)
    if not isinstance(first, dict):  # vLLM's own words
        message = str(first or "invalid request")
        return {"status": 415 if "Media Type" in message else 400, "message": message}
    if first.get("type") == "json_invalid":
        return {
            "status": 400,
            "message": f"the request body is not JSON: {first['ctx']['error']}",
            "code": "invalid_json",
        }
    param = param_of(first.get("loc", ()))
    message = str(first["msg"]).removeprefix("Value error, ")
    kind = str(first.get("type", ""))
    code = _VALIDATION_CODES.get(kind) or ("invalid_type" if "_type" in kind or "_parsing" in kind else "invalid_value")
    return {
        "status": 400,
        "message": f"{param}: {message}" if param else message,
        "param": param or None,
        "code": code,
    }


def _without_origin(found: Any) -> Any:
    """A finding of FastAPI's without the part of its place that says it is of the path or the query."""
    if isinstance(found, dict) and found.get("loc", ("body",))[:1] in (("path",), ("query",)):
        return {**found, "loc": found["loc"][1:]}
    return found


def param_of(place: Iterable[Any]) -> str:
    """A place in a request body as OpenAI writes it: ("body", "messages", 0, "role") is messages[0].role.

    Names of types, which pydantic puts where it tried several, are left out.
    """
    param = ""
    for part in place:
        if isinstance(part, int):
            param += f"[{part}]"
        elif str(part).isidentifier() and str(part) not in _NO_FIELDS and not str(part)[0].isupper():
            param += f".{part}" if param else str(part)
    return param


class OpenAIApp(FastAPI):
    """A FastAPI app that keeps Serve's own handlers out.

    Serve adds them to the app it gets, for the two exceptions of a router that cannot take a request, and they answer
    in plain text. Without a handler the exceptions reach `ErrorsStayInside`.
    """

    def add_exception_handler(self, exc_class_or_status_code: int | type[Exception], handler: Any) -> None:
        """As FastAPI's, but without effect for the exceptions that Serve raises."""
        if exc_class_or_status_code not in (BackPressureError, DeploymentUnavailableError):
            super().add_exception_handler(exc_class_or_status_code, handler)


def add_error_handlers(app: OpenAIApp, retry_after_s: int) -> None:
    """Let `app` answer every exception in OpenAI's format. Call it before adding other middleware."""

    async def handle(_: Request, error: Exception) -> JSONResponse:
        return response_for(error, retry_after_s)

    for kind in (RequestValidationError, HTTPException):
        app.add_exception_handler(kind, handle)
    app.add_middleware(ErrorsStayInside, retry_after_s=retry_after_s)


class ErrorsStayInside:
    """Answers exceptions that no handler took, instead of passing them on.

    Starlette's handler for `Exception` answers and then raises again. Serve would carry the exception to its proxy,
    which would log it once more and import what it takes to unpickle it.
    """

    def __init__(self, app: ASGIApp, retry_after_s: int) -> None:
        self._app = app
        self._retry_after_s = retry_after_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection; anything but HTTP passes through."""
        started = False

        async def note_start(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, note_start)
        except Exception as error:
            if scope["type"] != "http":
                raise
            response = response_for(error, self._retry_after_s)
            if not started:
                await response(scope, receive, send)
                return
            # The stream has started, so its status is sent already; the error becomes its last event.
            last = b"data: " + bytes(response.body) + b"\n\ndata: [DONE]\n\n"
            await send({"type": "http.response.body", "body": last, "more_body": False})
