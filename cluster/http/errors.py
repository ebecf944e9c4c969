"""Every error that a client sees, in OpenAI's format: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
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


class UnavailableError(RuntimeError):
    """What the answer needs is away for now; the client sees the message with status 503."""


_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    503: "overloaded_error",
}
_CODES = {401: "invalid_api_key", 404: "not_found"}


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of one error."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code or _CODES.get(status)}}


def error_response(
    status: int, message: str, param: str | None = None, code: str | None = None, retry_after_s: int | None = None
) -> JSONResponse:
    """One error as a response; `retry_after_s` becomes the Retry-After header."""
    headers = None if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    return JSONResponse(error_body(status, message, param, code), status_code=status, headers=headers)


def response_for(error: BaseException, retry_after_s: int) -> JSONResponse:
    """The response to any exception. An unexpected one is logged, and the client does not see its details."""
    if isinstance(error, RequestValidationError | ValidationError):
        return _validation_response(error)
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
    status = getattr(error, "status_code", None)
    message = getattr(error, "message", None)
    if isinstance(status, int) and isinstance(message, str):  # Ray Serve LLM's OpenAIHTTPException
        return error_response(status, message)
    if isinstance(error, RayError):
        cause = getattr(error, "cause", None)
        if isinstance(cause, ValueError | BackPressureError):
            return response_for(cause, retry_after_s)
        logger.error("a router failed under a request: %r", error)
        return error_response(503, "the router that had this request failed; try again", retry_after_s=retry_after_s)
    if isinstance(error, ValueError):
        return error_response(400, str(error))
    logger.error("unexpected error under a request", exc_info=error)
    return error_response(500, "internal error; see the log of the ingress")


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
    and the proxy would import vllm to unpickle one of Ray Serve LLM's: for seconds no request would get through.
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


def _validation_response(error: RequestValidationError | ValidationError) -> JSONResponse:
    first: Any = next(iter(error.errors()), {"msg": "invalid request", "loc": ()})
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    if first.get("type") == "json_invalid":
        return error_response(400, f"the request body is not JSON: {first['ctx']['error']}", code="invalid_json")
    message = str(first["msg"]).removeprefix("Value error, ")
    return error_response(
        400, f"{place}: {message}" if place else message, param=place or None, code="invalid_parameter"
    )
