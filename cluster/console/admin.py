"""Who may see and change the service over HTTP: holders of an admin key. Without any, all who come in see it."""

from __future__ import annotations

from collections.abc import Callable, Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.http.errors import error_response
from cluster.http.gate import OPEN_PATHS, key_in
from cluster.keys.keyring import Keyring

READING = frozenset({"GET", "HEAD", "OPTIONS"})
# Goes with reading: what it drops is sampled again.
HARMLESS = frozenset({("DELETE", "/trace")})
# A key of any role may read these; everything else shows hosts.
FOR_CLIENTS = frozenset({*OPEN_PATHS, "/usage"})

NO_ADMIN = (
    "nobody may change the service over HTTP, since the console has no admin keys: let http.keys_file of the "
    "application with serve_app:build_console name a file with a line of `expertmesh keys new --name NAME "
    "--role admin`, or use `expertmesh placement` where the cluster runs"
)


class AdminGate:
    """ASGI middleware inside `Gate`: every request but those for FOR_CLIENTS and `open_paths` needs an admin key.

    If keys have no roles (not `named`) and none is an admin key, whoever `Gate` lets in may read.
    """

    def __init__(
        self, app: ASGIApp, keys: Callable[[], Keyring], named: bool, open_paths: Collection[str] = ()
    ) -> None:
        self._app = app
        self._open_paths = FOR_CLIENTS | frozenset(open_paths)
        self._keys = keys
        self._named = named

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection; what is no request passes through if no key is asked for."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        keys, key = self._keys(), key_in(scope)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        method = scope.get("method", "GET")  # of a WebSocket
        all_read = not self._named and not keys.has_role("admin")
        if (
            (key is not None and key.role == "admin")
            or method == "OPTIONS"
            or (method in READING and (all_read or path in self._open_paths))
            or (all_read and (method, path) in HARMLESS)
        ):
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if not keys.has_role("admin"):
            response = error_response(403, NO_ADMIN, code="no_admin_keys")
        else:
            response = error_response(403, "an API key may not see or change the service: send an admin key")
        await response(scope, receive, send)
