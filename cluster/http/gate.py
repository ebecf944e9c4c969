"""Who may ask, and how many at once: keys and the queue limit, as one ASGI middleware that leaves streams alone."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.http.errors import error_response

OPEN_PATHS = frozenset({"/health", "/ready", "/live", "/metrics", "/docs", "/openapi.json"})


class Gate:
    """Answers 401 to a request without a valid key (if there are keys), and 503 to one over the limit.

    `more_digests` are SHA-256 digests of further keys. The limit is on requests to `limited_paths` that are running.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Collection[str],
        max_pending: int,
        retry_after_s: int,
        limited_paths: Collection[str] = (),
        more_digests: Collection[bytes] = (),
    ) -> None:
        self._app = app
        self._digests = [*digests_of(keys), *more_digests]
        self._limited_paths = frozenset(limited_paths)
        self._max_pending = max_pending
        self._retry_after_s = retry_after_s
        self._pending = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection. A WebSocket without a key is closed; what is neither passes through."""
        if scope["type"] == "websocket" and self._digests and not carries_key(scope, self._digests):
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http" or scope["method"] == "OPTIONS":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self._digests and path not in OPEN_PATHS and not carries_key(scope, self._digests):
            response = error_response(401, "no valid API key: send one as 'Authorization: Bearer KEY'")
            response.headers["WWW-Authenticate"] = "Bearer"
            await response(scope, receive, send)
            return
        if path not in self._limited_paths:
            await self._app(scope, receive, send)
            return
        if self._pending >= self._max_pending:
            message = f"{self._pending} requests are pending, which is the limit; try again"
            response = error_response(503, message, code="queue_full", retry_after_s=self._retry_after_s)
            await response(scope, receive, send)
            return
        self._pending += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._pending -= 1


def digests_of(keys: Collection[str]) -> list[bytes]:
    """SHA-256 digests, which are compared instead of the keys: as long as each other, whatever the keys' lengths."""
    return [_digest(key) for key in keys]


def carries_key(scope: Scope, digests: Collection[bytes]) -> bool:
    """Whether a connection's Authorization header has one of the keys with these digests."""
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, key = value.decode("latin-1").partition(" ")
            digest = _digest(key.strip())
            matches = [hmac.compare_digest(digest, known) for known in digests]
            return scheme.lower() == "bearer" and any(matches)
    return False


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
