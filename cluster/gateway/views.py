"""What a gateway answers for all its models at once: their list, and whether they are well."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from cluster.gateway.forward import Asked, Forwarder, RouterGoneError
from cluster.gateway.models import Models
from cluster.http.errors import error_response
from cluster.http.health import Shared

ASK_S = 20.0
MODELS = "/v1/models"

View = Callable[[Scope], Awaitable[Response]]


class Views:
    """The handlers of what needs no model."""

    def __init__(self, models: Models, forwarder: Forwarder, retry_after_s: int) -> None:
        self._models, self._forwarder = models, forwarder
        self._retry_after_s = retry_after_s
        # These need no key, so what they ask of routers is asked once for all who wait.
        self._health = Shared(lambda: self._ask_all("/health", ()))
        self._ready = Shared(lambda: self._ask_all("/ready", ()))

    def of(self, method: str, path: str) -> View | None:
        """The handler of a request; None if it is for a model."""
        if method not in ("GET", "HEAD"):
            return None
        if path == MODELS or path.startswith(f"{MODELS}/"):
            return self.models
        return {"/live": self.live, "/health": self.health, "/ready": self.ready}.get(path)

    async def live(self, scope: Scope) -> Response:
        """200 while this process answers."""
        return JSONResponse({"status": "ok"})

    async def health(self, scope: Scope) -> Response:
        """200 while at least one version of one model generates; those that do not are named."""
        return self._told(await self._health(), any)

    async def ready(self, scope: Scope) -> Response:
        """200 once a router of every version of every model has generated a token."""
        return self._told(await self._ready(), all)

    async def models(self, scope: Scope) -> Response:
        """All models with their adapters, or one. A model whose routers are away is listed by its name alone."""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        headers = [pair for pair in scope["headers"] if pair[0] == b"authorization"]
        cards = await asyncio.gather(*(self._cards(model, headers) for model in self._models.versions))
        found = [card for each in cards for card in each]
        if path == MODELS:
            return JSONResponse({"object": "list", "data": found})
        named = path.removeprefix(f"{MODELS}/")
        card = next((card for card in found if card["id"] == named), None)
        if card is None:
            there = ", ".join(self._models.versions) or "none"
            told = f"The model `{named}` does not exist. There are: {there}"
            return error_response(404, told, param="model", code="model_not_found")
        return JSONResponse(card)

    async def _cards(self, model: str, headers: Any) -> list[dict[str, Any]]:
        """Of the model and its adapters, as the first version with a router lists them."""
        for version in self._models.split(model).order(""):
            status, body = await self._ask(model, version, MODELS, headers)
            if status == 200 and isinstance(body, dict):
                return list(body["data"])
        return [{"id": model, "object": "model", "created": 0, "owned_by": "expertmesh"}]

    async def _ask_all(self, path: str, headers: Any) -> dict[tuple[str, str], tuple[int, Any]]:
        """What a router of each version answers to a GET."""
        places = [(model, version) for model, one in self._models.versions.items() for version in one.versions]
        answers = await asyncio.gather(*(self._ask(*place, path, headers) for place in places))
        return dict(zip(places, answers, strict=True))

    async def _ask(self, model: str, version: str, path: str, headers: Any) -> tuple[int, Any]:
        """(status, JSON) of one router's answer; (0, why) without any."""
        pool, tried = self._models.pool(model, version), set[str]()
        why = "no router runs"
        while (endpoint := pool.pick(tried)) is not None:
            tried.add(endpoint.router_id)
            try:
                async with asyncio.timeout(ASK_S):
                    async with await self._forwarder.ask(endpoint, Asked("GET", path, headers, b"")) as answer:
                        return answer.status, json.loads(await answer.read())
            except (RouterGoneError, OSError, ValueError) as error:  # TimeoutError is an OSError
                pool.set_aside(endpoint)
                why = str(error) or "no answer in time"
        return 0, why

    def _told(self, answers: dict[tuple[str, str], tuple[int, Any]], enough: Callable[[Any], bool]) -> Response:
        ok = enough(status == 200 for status, _ in answers.values()) and bool(answers)
        sick = {place: answer for place, (status, answer) in answers.items() if status != 200}
        reasons = [f"{model} ({version}): {_reason(answer)}" for (model, version), answer in sick.items()]
        models: dict[str, dict[str, Any]] = {}
        for (model, version), (status, answer) in answers.items():
            models.setdefault(model, {})[version] = {"ok": status == 200, "reason": _reason(answer)}
        body = {
            "status": "unavailable" if not ok else "degraded" if sick else "ok",
            "reason": "; ".join(reasons) if answers else "the gateway has no models",
            "models": models,
        }
        headers = None if ok else {"Retry-After": str(self._retry_after_s)}
        return JSONResponse(body, status_code=200 if ok else 503, headers=headers)


def _reason(answer: Any) -> str:
    return str(answer.get("reason", "")) if isinstance(answer, dict) else str(answer)
