"""Who may change the service over HTTP: holders of an admin key, and nobody while there is none."""

from __future__ import annotations

from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.http.errors import error_response
from cluster.http.gate import carries_key, digests_of

READING = frozenset({"GET", "HEAD", "OPTIONS"})
# Open to those who may read, unless there are admin keys: what it drops is sampled again.
HARMLESS = frozenset({("DELETE", "/trace")})

NO_ADMIN = (
    "nobody may change the service over HTTP, since the console has no admin keys: let http.admin_keys_env of the "
    "application with serve_app:build_console name an environment variable that holds one, or use `python -m cluster "
    "placement` where the cluster runs"
)


class AdminGate:
    """ASGI middleware inside `Gate`: every request that does not just read needs an admin key."""

    def __init__(self, app: ASGIApp, admin_keys: Collection[str], api_keys: Collection[str]) -> None:
        self._app = app
        self._admins, self._readers = digests_of(admin_keys), digests_of(api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection; anything but HTTP passes through."""
        if scope["type"] != "http" or scope["method"] in READING or carries_key(scope, self._admins):
            await self._app(scope, receive, send)
            return
        what = (scope["method"], scope["path"].removeprefix(scope.get("root_path", "")))
        if not self._admins:
            if what in HARMLESS:
                await self._app(scope, receive, send)
                return
            response = error_response(403, NO_ADMIN, code="no_admin_keys")
        elif carries_key(scope, self._readers):
            response = error_response(403, "an API key may not change the service: send an admin key")
        else:
            response = error_response(401, "no valid admin key: send one as 'Authorization: Bearer KEY'")
            response.headers["WWW-Authenticate"] = "Bearer"
        await response(scope, receive, send)
