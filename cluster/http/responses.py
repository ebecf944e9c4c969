"""Every error of vLLM's app in OpenAI's format, whatever layer answered, and its status the client's or ours.

vLLM's handlers answer errors of their own in five shapes, some of them as the first event of a stream with status 200.
Successful responses pass as they are; of a stream only the first bytes of each chunk are compared.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.http import vllm_joints
from cluster.http.errors import RefusedError, UnavailableError, error_response, response_for
from cluster.http.health import HEALTH_PATHS
from cluster.http.paths.absent import why_absent
from cluster.http.requests import found_in

logger = logging.getLogger("ray.serve")

ERROR_EVENTS = (b'data: {"error":', b"event: error\n")
PATHS = "expertmesh_paths"  # of an app's state: the paths that make its engine work
INTERNAL = "internal error in this router, whose log says more: send the request again"


class OneErrorFormat:
    """ASGI middleware around everything else."""

    def __init__(self, app: ASGIApp, retry_after_s: int) -> None:
        self._app = app
        self._retry_after_s = retry_after_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection; anything but HTTP passes through."""
        if scope["type"] != "http" or _path(scope) in HEALTH_PATHS:  # a 503 of theirs is an answer
            await self._app(scope, receive, send)
            return
        answer = _Answer(scope, receive, send, self._retry_after_s)
        try:
            await self._app(scope, receive, answer.send)
        except Exception as error:
            await answer.fail(error)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of a Rust library; others end the task or the process
                raise
            await answer.fail(error)


def answer_exception(scope: Scope, error: BaseException, retry_after_s: int) -> JSONResponse:
    """The response to an exception under a request to vLLM's app."""
    if isinstance(error, RuntimeError) and str(error).startswith("Caught handled exception") and error.__cause__:
        error = error.__cause__  # Starlette's, for an exception after the start of a response
    if isinstance(error, HTTPException):
        response = error_response(**_of_the_framework(scope, error.status_code, str(error.detail)))
        response.headers.update(error.headers or {})  # which methods are allowed
        return response
    if isinstance(error, RefusedError | RequestValidationError | UnavailableError):
        return response_for(error, retry_after_s)
    found = found_in(scope)
    fields = vllm_joints.fields_of(error, found.fields, found.has_grammar)
    if fields is None:
        logger.error("unexpected error under %s %s", scope["method"], scope["path"], exc_info=error)
        fields = {"status": 500, "message": INTERNAL}
    return error_response(**fields, retry_after_s=retry_after_s if fields["status"] == 503 else None)


def _of_the_framework(scope: Scope, status: int, detail: str) -> dict[str, Any]:
    """Arguments of `error_response` for what FastAPI and Starlette refuse."""
    asked = f"{scope['method']} {scope['path']}"
    if status == 404 and detail == "Not Found":
        there = getattr(getattr(scope.get("app"), "state", None), PATHS, ())
        why = why_absent(_path(scope), there)
        message = f"this service has no {asked}: {why}" if why else f"there is no {asked}: see /docs"
        return {"status": 404, "message": message, "code": "unknown_url"}
    if status == 405:
        return {"status": 405, "message": f"{asked} is not supported: see /docs"}
    return {"status": status, "message": detail}


class _Answer:
    """One response on its way out."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, retry_after_s: int) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._retry_after_s = retry_after_s
        self._start: Message | None = None  # held back until it is clear that it is no error
        self._error_body: list[bytes] | None = None
        self._is_stream = False
        self._under_way = False  # a response that has begun well
        self._replaced = False  # an error went out instead of a stream that has begun with one

    async def send(self, message: Message) -> None:
        """What the app sends."""
        if self._under_way and not message.get("body", b"").startswith(ERROR_EVENTS):
            await self._send(message)
            return
        if self._replaced:
            return
        if message["type"] == "http.response.start":
            self._is_stream = _content_type(message).startswith(b"text/event-stream")
            if message["status"] >= 400:
                self._start, self._error_body = message, []
            elif self._is_stream:
                self._start = message
            else:
                self._under_way = True
                await self._send(message)
        elif self._error_body is not None:
            self._error_body.append(message.get("body", b""))
            if not message.get("more_body", False):
                await self._send_error()
        elif self._is_stream and message["type"] == "http.response.body":
            await self._send_chunk(message)
        else:
            await self._send(message)

    async def fail(self, error: BaseException) -> None:
        """Answer an exception; if the response is under way, with its last event."""
        response = answer_exception(self._scope, error, self._retry_after_s)
        if self._under_way:
            last = _event(self._scope, bytes(response.body)) + b"data: [DONE]\n\n" if self._is_stream else b""
            await self._send({"type": "http.response.body", "body": last, "more_body": False})
        elif self._replaced:
            logger.error("exception after an error was answered", exc_info=error)
        else:
            self._replaced = True
            await _dressed(self._scope, response)(self._scope, self._receive, self._send)

    async def _send_chunk(self, message: Message) -> None:
        body = message.get("body", b"")
        if body.startswith(ERROR_EVENTS):
            fields = self._fields_of(body[body.index(b"data: ") + 6 :].partition(b"\n")[0], None)
            if self._start is not None:
                self._replaced = True
                await self._respond(fields, [])
                return
            event = _event(self._scope, bytes(error_response(**fields).body))
            message = {**message, "body": event + body.partition(b"\n\n")[2]}
        if self._start is not None:
            start, self._start = self._start, None
            self._under_way = True
            await self._send(start)
        await self._send(message)

    async def _send_error(self) -> None:
        assert self._start is not None
        assert self._error_body is not None
        self._replaced = True
        kept = [
            (name, value)
            for name, value in self._start["headers"]
            if name.lower() not in (b"content-length", b"content-type", b"retry-after")
        ]
        fields = self._fields_of(b"".join(self._error_body), self._start["status"])
        await self._respond(fields, kept, dict(self._start["headers"]).get(b"retry-after"))

    async def _respond(
        self, fields: dict[str, Any], headers: list[tuple[bytes, bytes]], retry_after: bytes | None = None
    ) -> None:
        if retry_after is None and fields["status"] == 503:
            retry_after = str(self._retry_after_s).encode()
        response = _dressed(self._scope, error_response(**fields))
        response.raw_headers.extend([*headers, *([] if retry_after is None else [(b"retry-after", retry_after)])])
        await response(self._scope, self._receive, self._send)

    def _fields_of(self, body: bytes, status: int | None) -> dict[str, Any]:
        """Arguments of `error_response` for an error in any of vLLM's shapes; None is the status of an event."""
        try:
            told = json.loads(body)
        except ValueError:
            told = body.decode(errors="replace")
        told = told if isinstance(told, dict) else {"detail": told}
        error = told.get("error", told.get("detail"))
        error = error if isinstance(error, dict) else {"message": error}
        message = str(error.get("message") or "")
        code, param = error.get("code"), error.get("param")
        if message == vllm_joints.EXPERTS_UNAVAILABLE:
            return vllm_joints.unavailable_fields()
        if status is None:
            status = 500 if "internal" in str(error.get("type")).lower() else 400
        elif isinstance(code, str):  # ours
            return {"status": status, "message": message, "param": param, "code": code, "kind": error.get("type")}
        return self._judge(code if isinstance(code, int) else status, message, param)

    def _judge(self, status: int, message: str, param: str | None) -> dict[str, Any]:
        found = found_in(self._scope)
        if status == 501:
            return vllm_joints.client_fields(400, message, param, found.fields)
        if 400 <= status < 500:
            return vllm_joints.client_fields(status, message or "the request is not valid", param, found.fields)
        if status == 503:
            return {"status": 503, "message": message or "this router cannot take the request now: try again"}
        if found.has_grammar and message == "Internal server error":
            return vllm_joints.grammar_fields(found.fields)
        logger.error("vLLM answered %s %s with %d: %s", self._scope["method"], self._scope["path"], status, message)
        return {"status": 500, "message": INTERNAL}


def _path(scope: Scope) -> str:
    """The path below the route prefix."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def _content_type(start: Message) -> bytes:
    return next((value for name, value in start["headers"] if name.lower() == b"content-type"), b"")


def _is_anthropic(scope: Scope) -> bool:
    return str(scope["path"]).startswith("/v1/messages")


def _dressed(scope: Scope, response: JSONResponse) -> JSONResponse:
    """An error as the clients of this path know it: Anthropic's have OpenAI's fields and one more."""
    if not _is_anthropic(scope):
        return response
    dressed = JSONResponse({"type": "error", **json.loads(bytes(response.body))}, response.status_code)
    if "retry-after" in response.headers:
        dressed.headers["retry-after"] = response.headers["retry-after"]
    return dressed


def _event(scope: Scope, body: bytes) -> bytes:
    """An error as an event of a stream."""
    if _is_anthropic(scope):
        return b'event: error\ndata: {"type":"error",' + body[1:] + b"\n\n"
    return b"data: " + body + b"\n\n"
