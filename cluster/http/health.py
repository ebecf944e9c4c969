"""Whether routers generate, or pool: three routes for three askers, and where the answers come from.

- `/health`, for people and load balancers: 200 while at least one router does; the sick ones are named.
- `/ready`, for whoever sends the first request here: 200 once this router has generated a token, or pooled one.
- `/live`, for whoever restarts processes: 200 while this one answers at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

from fastapi import FastAPI
from fastapi.responses import JSONResponse

HEALTH_PATHS = ("/health", "/ready", "/live")
T = TypeVar("T")


@dataclass(frozen=True)
class GenerationHealth:
    """Whether this router generates tokens, or pools them, with its experts on shards."""

    ok: bool
    router_id: str
    reason: str  # why not; empty if ok
    how: Literal["recent token", "probe"]  # what the answer rests on
    # None if the engine's worker did not say.
    epoch: int | None = None
    connected: list[int] | None = None  # ranks
    lost: dict[int, str] | None = None  # why there is no link, by rank
    keys: str | None = None  # why the list of keys in use is not that of the file
    start_s: dict[str, float] | None = None  # how long each part of the router's start took

    def to_dict(self) -> dict[str, Any]:
        """Plain data with these fields as keys, without those that are None."""
        return {key: value for key, value in asdict(self).items() if value is not None}


class HealthSource(Protocol):
    """What the health routes ask. Both answer within a time-out of their own and do not raise."""

    async def all_routers(self) -> tuple[list[GenerationHealth], list[str]]:
        """(healths of the routers that answered, one line for each that did not)."""
        ...

    async def ready(self) -> GenerationHealth:
        """Whether this router has generated or pooled a token since it started; does so if not."""
        ...


class Shared(Generic[T]):
    """One call at a time, whose result everybody gets who asks meanwhile: the routes need no key."""

    def __init__(self, ask: Callable[[], Awaitable[T]]) -> None:
        self._ask = ask
        self._running: asyncio.Future[T] | None = None

    async def __call__(self) -> T:
        if self._running is None or self._running.done():
            self._running = asyncio.ensure_future(self._ask())
        return await asyncio.shield(self._running)


def add_health_routes(app: FastAPI, source: HealthSource, retry_after_s: int) -> None:
    """`/health`, `/ready` and `/live` on an app that has no routes of these names."""
    all_routers, ready_here = Shared(source.all_routers), Shared(source.ready)

    def respond(ok: bool, body: dict[str, Any]) -> JSONResponse:
        headers = None if ok else {"Retry-After": str(retry_after_s)}
        return JSONResponse(body, status_code=200 if ok else 503, headers=headers)

    @app.get("/health")
    async def health() -> JSONResponse:
        """200 while at least one router generates (or pools) tokens through the shards; the sick ones are named."""
        routers, errors = await all_routers()
        errors = [*errors, *(f"{router.router_id}: {router.reason}" for router in routers if not router.ok)]
        ok = any(router.ok for router in routers)
        return respond(
            ok,
            {
                "status": "unavailable" if not ok else "degraded" if errors else "ok",
                "reason": "; ".join(errors) if routers or errors else "there is no router yet",
                "routers": [router.to_dict() for router in routers],
            },
        )

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """200 once this router has generated (or pooled) a token."""
        state = await ready_here()
        body = {"status": "ok" if state.ok else "unavailable", "reason": state.reason, "router": state.to_dict()}
        return respond(state.ok, body)

    @app.get("/live")
    async def live() -> JSONResponse:
        """200 while this process answers."""
        return JSONResponse({"status": "ok"})
