"""Requests that come while no router runs, since `min_replicas` is 0: they wait in Serve's own proxy, behind HAProxy.

Serve calls `middlewares` in that proxy (`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`). The request itself makes the
autoscaler start a router, and goes there once it runs. Who has waited WAIT_S and still has no router is told to come
again, before something on the way loses patience: load balancers usually do after a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.http.errors import error_response
from cluster.ray_joints import any_replica_serves, in_replica
from cluster.serve_environment import HAPROXY_SWITCH

logger = logging.getLogger("ray.serve")

WAIT_S, AGAIN_S = 50.0, 10
SHOWN_FROM_S = 1.0
WAITED, STARTING = b"x-expertmesh-waited-s", "x-expertmesh-router-starting"


def middlewares() -> list[Middleware]:
    """What Serve puts before its own proxy: nothing where that one takes all requests, and nothing before routers."""
    return [Middleware(Waking)] if os.environ.get(HAPROXY_SWITCH) == "1" and not in_replica() else []


class Waking:
    """Says in a header how long an answer waited, and answers 503 with Retry-After where no router came in `wait_s`."""

    def __init__(
        self, app: ASGIApp, wait_s: float = WAIT_S, serves: Callable[[str], bool | None] = any_replica_serves
    ) -> None:
        """`serves` says whether a router runs for a path; None: unknown."""
        self._app, self._wait_s, self._serves = app, wait_s, serves

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun_s, started, told = time.monotonic(), asyncio.Event(), False

        async def send_waited(message: Message) -> None:
            if told:
                return
            if message["type"] == "http.response.start":
                started.set()
                waited_s = time.monotonic() - begun_s
                if waited_s >= SHOWN_FROM_S:
                    header = (WAITED, f"{waited_s:.1f}".encode())
                    message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        answer = asyncio.ensure_future(self._app(scope, receive, send_waited))
        try:
            patience = asyncio.ensure_future(started.wait())
            await asyncio.wait((answer, patience), timeout=self._wait_s, return_when=asyncio.FIRST_COMPLETED)
            patience.cancel()
            # A router that runs has the request by now, and may need as long as it likes.
            if not (answer.done() or started.is_set()) and await self._none_serves(scope["path"]):
                told = not started.is_set()
            if told:
                await self._tell(scope, receive, send)
            else:
                await answer
        finally:
            answer.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await answer

    async def _none_serves(self, path: str) -> bool:
        return await asyncio.to_thread(self._serves, path) is False

    async def _tell(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = f"no router runs yet; one is being started: try again in {AGAIN_S} s"
        response = error_response(503, message, code="router_starting", retry_after_s=AGAIN_S)
        response.headers[STARTING] = "1"
        response.headers[WAITED.decode()] = f"{self._wait_s:.1f}"
        await response(scope, receive, send)
