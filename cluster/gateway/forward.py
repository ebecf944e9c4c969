"""One request by HTTP to one router, and its answer chunk by chunk."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import aiohttp
from multidict import CIMultiDict
from starlette.types import Send

from cluster.gateway.pool import Endpoint
from cluster.http.errors import error_body

logger = logging.getLogger("ray.serve")

CONNECT_S, PREFIX_S = 3.0, 5.0
PREFIX_KEPT_S = 30.0  # a changed route_prefix reaches replicas that run
VERSION = b"x-expertmesh-version"
# Of one connection, not of the request; or the gateway's own to say.
_NOT_PASSED_ON = frozenset({b"connection", b"keep-alive", b"transfer-encoding", b"upgrade", b"te", b"trailer"})
_NOT_TO_ROUTERS = _NOT_PASSED_ON | {b"content-length", b"expect", VERSION}
_NOT_TO_CLIENTS = _NOT_PASSED_ON | {VERSION, b"date", b"server"}

Headers = Iterable[tuple[bytes, bytes]]


class RouterGoneError(Exception):
    """A router gave no answer. `sent`: it may have begun to work."""

    def __init__(self, why: str, sent: bool) -> None:
        super().__init__(why)
        self.sent = sent


@dataclass(frozen=True)
class Asked:
    """What a client asks for."""

    method: str
    path: str  # below the gateway's route prefix, with a query
    headers: Headers
    body: bytes


class Forwarder:
    """HTTP to routers. Each request has a connection of its own, as routers close theirs after an answer."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None
        self._prefixes: dict[str, tuple[float, str]] = {}  # (when it was asked for, route prefix) by router

    async def ask(self, endpoint: Endpoint, asked: Asked) -> aiohttp.ClientResponse:
        """The head of a router's answer. Raises RouterGoneError without one."""
        prefix = await self._prefix(endpoint)
        headers = CIMultiDict(
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in asked.headers
            if name not in _NOT_TO_ROUTERS
        )
        try:
            return await self._http().request(
                asked.method,
                f"http://{_netloc(endpoint)}{prefix}{asked.path}",
                data=asked.body or None,
                headers=headers,
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
                allow_redirects=False,
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise RouterGoneError(str(error), sent=False) from error
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise RouterGoneError(str(error) or type(error).__name__, sent=True) from error

    async def close(self) -> None:
        """End all connections."""
        if self._session is not None:
            await self._session.close()

    async def _prefix(self, endpoint: Endpoint) -> str:
        """Below which path the router serves, as it says itself."""
        kept = self._prefixes.get(endpoint.router_id)
        if kept is not None and time.monotonic() < kept[0] + PREFIX_KEPT_S:
            return kept[1]
        timeout = aiohttp.ClientTimeout(total=PREFIX_S)
        try:
            async with self._http().get(f"http://{_netloc(endpoint)}/-/routes", timeout=timeout) as answer:
                if answer.status != 200:
                    raise RouterGoneError(f"/-/routes answers with status {answer.status}", sent=False)
                (route,) = json.loads(await answer.read())
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise RouterGoneError(f"/-/routes: {error or type(error).__name__}", sent=False) from error
        now_s = time.monotonic()
        self._prefixes = {each: one for each, one in self._prefixes.items() if now_s < one[0] + PREFIX_KEPT_S}
        self._prefixes[endpoint.router_id] = (now_s, str(route or "").rstrip("/"))
        return self._prefixes[endpoint.router_id][1]

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:  # in the event loop that serves
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, force_close=True),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session


async def pass_on(answer: aiohttp.ClientResponse, send: Send, more_headers: Mapping[bytes, bytes]) -> bool:
    """Send a router's answer to the client, each chunk when it comes. False: it broke off, and the client was told.

    Raises ConnectionError if it broke off where nothing but a closed connection can tell.
    """
    kept = [(name, value) for name, value in _raw(answer) if _for_clients(name)]
    await send({"type": "http.response.start", "status": answer.status, "headers": [*kept, *more_headers.items()]})
    try:
        async for chunk in answer.content.iter_any():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
    except (aiohttp.ClientError, OSError) as error:
        logger.warning("a router broke off an answer: %r", error)
        if "text/event-stream" not in answer.headers.get("content-type", ""):
            raise ConnectionError("the router that answered broke off") from error
        told = error_body(503, "the router that had this request is gone; send it again", code="router_lost")
        event = f"data: {json.dumps(told)}\n\ndata: [DONE]\n\n".encode()
        await send({"type": "http.response.body", "body": event, "more_body": False})
        return False
    await send({"type": "http.response.body", "body": b"", "more_body": False})
    return True


def _raw(answer: aiohttp.ClientResponse) -> Headers:
    return ((name.lower(), value) for name, value in answer.raw_headers)


def _for_clients(name: bytes) -> bool:
    return name not in _NOT_TO_CLIENTS and not name.startswith(b"access-control-")


def _netloc(endpoint: Endpoint) -> str:
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    return f"{host}:{endpoint.port}"
