"""Who may ask, and how many at once: keys and the queue limit, as one ASGI middleware that leaves streams alone."""

from __future__ import annotations

from collections.abc import Callable, Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.http.errors import error_response
from cluster.keys.keyring import Key, Keyring

OPEN_PATHS = frozenset({"/health", "/ready", "/live", "/metrics", "/docs", "/openapi.json"})
KEY = "expertmesh.key"  # key of the scope


class Gate:
    """Answers 401 to a request without a valid key (if there are keys), and 503 to one over the limit.

    What is behind it finds whose key it was with `key_in`. `keys` gives the keys in use; `open_paths` need none. The
    limit is on requests to `limited_paths` that are running.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Callable[[], Keyring],
        max_pending: int,
        retry_after_s: int,
        limited_paths: Collection[str] = (),
        open_paths: Collection[str] = OPEN_PATHS,
    ) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = frozenset(open_paths)
        self._limited_paths = frozenset(limited_paths)
        self._max_pending = max_pending
        self._retry_after_s = retry_after_s
        self._pending = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection. A WebSocket without a key is closed; what is neither passes through."""
        if scope["type"] not in ("http", "websocket") or scope.get("method") == "OPTIONS":
            await self._app(scope, receive, send)
            return
        key = None
        if keys := self._keys():
            key = _key_of(scope, keys)
            if key is not None:
                scope[KEY] = key
        path = scope["path"].removeprefix(scope.get("root_path", "")) if scope["type"] == "http" else ""
        if keys and key is None and path not in self._open_paths:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
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


def key_in(scope: Scope) -> Key | None:
    """Whose key a connection behind a `Gate` has; None where no key is asked for."""
    return scope.get(KEY)


def _key_of(scope: Scope, keys: Keyring) -> Key | None:
    """The key in a connection's Authorization header."""
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, secret = value.decode("latin-1").partition(" ")
            return keys.find(secret.strip()) if scheme.lower() == "bearer" else None
    return None
