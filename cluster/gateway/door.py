"""The ASGI app of a gateway: reads which model a request names, and sends it on its way to a router of that model."""

from __future__ import annotations

from starlette.types import Receive, Scope, Send

from cluster.config.gateway.sections import GatewayHttpSection
from cluster.gateway.forward import VERSION, Forwarder, RouterGoneError, pass_on
from cluster.gateway.models import Models
from cluster.gateway.passage import Passage, while_there
from cluster.gateway.reading import Asked, ClientGoneError, model_in, path_of, read, sticky_of, version_asked
from cluster.gateway.views import Views
from cluster.http.errors import RefusedError, error_response

STORED = "/v1/responses/"


class Door:
    """Handles every request that the keys let in. Errors are raised as `response_for` takes them."""

    def __init__(self, models: Models, http: GatewayHttpSection, forwarder: Forwarder) -> None:
        self._models, self._http, self._forwarder = models, http, forwarder
        self._views = Views(models, forwarder, http.retry_after_s)
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if self._running >= self._http.max_requests:
            told = f"{self._running} requests are running, which is the limit; try again"
            busy = error_response(503, told, code="queue_full", retry_after_s=self._http.retry_after_s)
            await busy(scope, receive, send)
            return
        self._running += 1
        try:
            await self._answer(scope, receive, send)
        except ClientGoneError:
            return
        finally:
            self._running -= 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], path_of(scope)
        view = self._views.of(method, path)
        if view is not None:
            await (await view(scope))(scope, receive, send)
            return
        stored = path.startswith(STORED)
        if method != "POST" and not stored:
            told = f"the gateway has no {method} {path}: ask a model's routers below their own route prefix"
            raise RefusedError(told, code="unknown_url", status=404)
        asked = await read(scope, receive, self._http.max_body_bytes)
        if stored:
            await while_there(self._find(asked, send), receive)
            return
        model = self._model(await model_in(asked))
        passage = Passage(self._models, self._forwarder, model, asked)
        await passage.through(self._order(scope, model), receive, send)

    def _model(self, named: str | None) -> str:
        """The model of a request. RefusedError lists those there are."""
        there = ", ".join(self._models.versions) or "none"
        if named is None:
            if len(self._models.versions) == 1:
                return next(iter(self._models.versions))
            told = f"model: Field required, as this address has several: {there}"
            raise RefusedError(told, param="model", code="missing_required_parameter")
        model = self._models.name_of(named)
        if model is None:
            told = f"The model `{named}` does not exist. There are: {there}"
            raise RefusedError(told, param="model", code="model_not_found", status=404)
        return model

    def _order(self, scope: Scope, model: str) -> list[str]:
        """The versions to ask: the one that the header names alone, or all as the split has them."""
        split, named = self._models.split(model), version_asked(scope)
        if not named:
            return split.order(sticky_of(scope, split.versions))
        if named not in split.versions.versions:
            there = ", ".join(split.versions.versions)
            told = f"{model} has no version {named!r}; there are {there}"
            raise RefusedError(told, param=VERSION.decode(), code="invalid_value")
        return [named]

    async def _find(self, asked: Asked, send: Send) -> None:
        """Ask every router for what one of them has stored. RefusedError (404) if none has it."""
        for model, versions in self._models.versions.items():
            for version in versions.versions:
                pool, tried = self._models.pool(model, version), set[str]()
                while (endpoint := pool.pick(tried)) is not None:
                    tried.add(endpoint.router_id)
                    try:
                        async with await self._forwarder.ask(endpoint, asked) as answer:
                            if answer.status != 404:
                                await pass_on(answer, send, {})
                                return
                    except RouterGoneError:
                        pool.set_aside(endpoint)
        raise RefusedError(f"no router has {asked.path}", code="not_found", status=404)
