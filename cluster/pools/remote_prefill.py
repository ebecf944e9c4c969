"""One ASGI middleware next to vLLM's routes: a request's prompt is computed by another router before vLLM sees it."""

from __future__ import annotations

import json
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.http.asked import ASKED, Asked
from cluster.http.errors import RefusedError, response_for
from cluster.pools.prompts import PARAMS, Prompts, with_params

_TRACED = (b"traceparent", b"tracestate")


class RemotePrefill:
    """Behind `BodyCheck`, which has read the whole body and estimated it, and behind what refuses keys."""

    def __init__(self, app: ASGIApp, prompts: Prompts) -> None:
        self._app, self._prompts = app, prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection; status 400 for a request that says by itself where its KV cache is."""
        asked = scope.get(ASKED)
        if not isinstance(asked, Asked):  # no JSON, or no body
            await self._app(scope, receive, send)
            return
        message = await receive()
        body = message.get("body", b"")
        parsed = json.loads(body) if message["type"] == "http.request" else None
        if not isinstance(parsed, dict):
            await self._app(scope, _first(message, receive), send)
            return
        try:
            _refuse_own_params(parsed)
        except RefusedError as error:
            await response_for(error, 0)(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        handed = None
        if self._prompts.wants(path, parsed, asked):
            headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _TRACED}
            handed = await self._prompts.compute(path, parsed, asked.sequences, headers)
        if handed is None:
            await self._app(scope, _first(message, receive), send)
            return
        try:
            message = {**message, "body": with_params(body, handed.params)}
            await self._app(scope, _first(message, receive), send)
        finally:
            self._prompts.end(handed)


def remote_prefill(prompts: Prompts) -> Middleware:
    """The middleware for `front_door`."""
    return Middleware(RemotePrefill, prompts=prompts)


def _refuse_own_params(body: dict[str, Any]) -> None:
    """Whoever names a file or blocks could read what others have asked."""
    extra = body.get("vllm_xargs")
    if body.get(PARAMS) is not None or (isinstance(extra, dict) and PARAMS in extra):
        raise RefusedError(
            f"{PARAMS} is set by the routers, between prefill and decode: leave it out",
            param=PARAMS,
            code="not_supported",
        )


def _first(message: Message, receive: Receive) -> Receive:
    """A `receive` that hands out a message before what is still to come."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return message

    return replay
