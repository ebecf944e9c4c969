"""A gateway in this process before made-up routers, all with sockets of their own, in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn
from aiohttp import web

from cluster.config.gateway.sections import GatewayHttpSection, GatewayLive
from cluster.gateway.app import gateway_app
from cluster.gateway.forward import Forwarder
from cluster.gateway.models import Models
from cluster.gateway.pool import RouterPool


@dataclass
class FakeRouter:
    """Serves below a route prefix of its own what a router would; `behaviour` says how it answers a generation."""

    app: str
    behaviour: str = "answers"  # or: dies, breaks, is_busy, waits
    port: int = 0
    asked: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)  # path, headers, body
    go_on: asyncio.Event = field(default_factory=asyncio.Event)  # after the first chunk of a stream
    left: asyncio.Event = field(default_factory=asyncio.Event)  # a client that did not wait for the end
    _runner: Any = None

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/-/routes", self._routes)
        app.router.add_route("*", f"/models/{self.app}/{{path:.*}}", self._answer)
        # As uvicorn does: a handler is cancelled when its client has gone.
        self._runner = web.AppRunner(app, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]

    async def stop(self) -> None:
        """Refuse connections from now on."""
        await self._runner.cleanup()

    async def _routes(self, _: web.Request) -> web.Response:
        return web.json_response({f"/models/{self.app}": self.app})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path, body = "/" + request.match_info["path"], await request.read()
        if request.query_string:
            path += "?" + request.query_string
        self.asked.append((path, {name.lower(): value for name, value in request.headers.items()}, body))
        if request.method == "GET":
            return self._get(path)
        if self.behaviour == "dies":
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        if self.behaviour == "is_busy":
            return web.json_response({"error": {"code": "queue_full"}}, status=503, headers={"Retry-After": "7"})
        if not json.loads(body).get("stream"):
            return web.json_response({"app": self.app}, headers={"Access-Control-Allow-Origin": "nobody"})
        return await self._stream(request)

    def _get(self, path: str) -> web.Response:
        if path == "/v1/models":
            return web.json_response({"object": "list", "data": [{"id": "m", "root": self.app}, {"id": "m:lora"}]})
        ready = path in ("/health", "/ready") and self.behaviour != "is_busy"
        return web.json_response({"reason": "" if ready else f"{self.app} is busy"}, status=200 if ready else 503)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        await response.write(b"data: first\n\n")
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.left.set()
            raise
        if self.behaviour == "breaks":
            assert request.transport is not None
            request.transport.abort()
            return response
        await response.write(b"data: second\n\ndata: [DONE]\n\n")
        return response


@dataclass
class Scene:
    """The gateway's models, a client of it, and the routers by application."""

    models: Models
    client: httpx.AsyncClient
    routers: dict[str, list[FakeRouter]]

    def configure(self, models: dict[str, Any]) -> None:
        """What `user_config` does."""
        self.models.configure(GatewayLive.model_validate({"models": models}))

    async def ask(self, model: str | None = "m", **headers: str) -> httpx.Response:
        """A generation that is not streamed."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        body = {"prompt": "x"} if model is None else {"model": model, "prompt": "x"}
        return await self.client.post("/v1/completions", json=body, headers=named)


@contextlib.asynccontextmanager
async def gateway(
    models: dict[str, Any], routers: list[FakeRouter], http: dict[str, Any] | None = None
) -> AsyncIterator[Scene]:
    """A gateway with these models, that serves on a port of its own."""
    by_app: dict[str, list[FakeRouter]] = {}
    for router in routers:
        await router.start()
        by_app.setdefault(router.app, []).append(router)

    def pool_of(app: str) -> RouterPool:
        return RouterPool(lambda: {f"{app}-{i}": ("127.0.0.1", r.port) for i, r in enumerate(by_app.get(app, []))})

    known, forwarder = Models(pool_of), Forwarder()
    app = gateway_app(known, GatewayHttpSection.model_validate(http or {}), forwarder)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    serving = asyncio.create_task(server.serve())
    try:
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            scene = Scene(known, client, by_app)
            scene.configure(models)
            yield scene
    finally:
        server.should_exit = True
        await serving
        await forwarder.close()
        for router in routers:
            await router.stop()
