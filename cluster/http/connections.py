"""Connections between HAProxy and a router, of which none must be kept when the router stops; and browsers."""

from __future__ import annotations

import os
from collections.abc import Collection

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.http.quota import HEADERS
from cluster.serve_environment import HAPROXY_SWITCH


def close_where_haproxy_is() -> list[Middleware]:
    """`CloseAfterResponse` if HAProxy stands before this process, else nothing."""
    return [Middleware(CloseAfterResponse)] if os.environ.get(HAPROXY_SWITCH) == "1" else []


def open_to_origins(origins: Collection[str]) -> list[Middleware]:
    """What lets pages of these origins read answers; nothing without any, as browsers forbid it then."""
    if not origins:
        return []
    told = ["Retry-After", "traceresponse", *HEADERS]
    return [
        Middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"], expose_headers=told
        )
    ]


class CloseAfterResponse:
    """Closes the server side of each connection after its response; HAProxy keeps the client's side open.

    A router that stops closes the connections that HAProxy keeps to it. A request that HAProxy sends down one of them
    at that moment is lost: its client sees a closed connection, or status 500, in the middle of an upgrade. Only a
    refused connection is tried elsewhere.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""

        async def send_closing(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [pair for pair in message.get("headers", ()) if pair[0].lower() != b"connection"]
                message = {**message, "headers": [*kept, (b"connection", b"close")]}
            await send(message)

        await self._app(scope, receive, send_closing if scope["type"] == "http" else send)
