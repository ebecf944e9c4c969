"""The three health routes: which status each gives, and what it says."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from cluster.http.health import GenerationHealth, Shared, add_health_routes
from cluster.http.responses import OneErrorFormat
from tests.support.waiting import run_async, within

SOUND = GenerationHealth(
    ok=True, router_id="a", reason="", how="recent token", epoch=3, connected=[0], lost={1: "gone"}
)
SICK = GenerationHealth(ok=False, router_id="b", reason="the engine gave no answer within 10.0 s", how="probe")
SILENT = "a router did not answer generation_health in 0.2 s"


class Source:
    def __init__(self, healths: list[GenerationHealth], errors: list[str], here: GenerationHealth = SOUND) -> None:
        self._answer, self._here = (healths, errors), here

    async def all_routers(self) -> tuple[list[GenerationHealth], list[str]]:
        return self._answer

    async def ready(self) -> GenerationHealth:
        return self._here


def get(source: Source, path: str) -> httpx.Response:
    app = FastAPI()
    add_health_routes(app, source, retry_after_s=3)
    # As in a router, below a route prefix, which Serve leaves in the path.
    behind = httpx.ASGITransport(OneErrorFormat(app, retry_after_s=3), root_path="/prefix")

    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=behind, base_url="http://mesh") as client:
            return await client.get(f"/prefix{path}")

    return run_async(run())


@pytest.mark.parametrize(
    ("healths", "errors", "ok", "status", "reason"),
    [
        ([SOUND], [], True, "ok", ""),
        ([SOUND, SICK], [], True, "degraded", "b: the engine gave no answer within 10.0 s"),
        ([SICK, SOUND], [SILENT], True, "degraded", f"{SILENT}; b: the engine gave no answer within 10.0 s"),
        ([SOUND], [SILENT], True, "degraded", SILENT),
        ([SICK], [], False, "unavailable", "b: the engine gave no answer within 10.0 s"),
        ([], [SILENT], False, "unavailable", SILENT),
        ([], [], False, "unavailable", "there is no router yet"),
    ],
)
def test_the_service_is_healthy_while_one_router_generates(
    healths: list[GenerationHealth], errors: list[str], ok: bool, status: str, reason: str
) -> None:
    response = get(Source(healths, errors), "/health")
    assert response.status_code == (200 if ok else 503)
    assert response.headers.get("retry-after") == (None if ok else "3")
    body = response.json()
    assert (body["status"], body["reason"]) == (status, reason)
    assert [router["router_id"] for router in body["routers"]] == [health.router_id for health in healths]


def test_what_is_known_of_a_router_is_shown() -> None:
    [router] = get(Source([SOUND], []), "/health").json()["routers"]
    assert router == {
        **{"ok": True, "router_id": "a", "reason": "", "how": "recent token"},
        **{"epoch": 3, "connected": [0], "lost": {"1": "gone"}},
    }


@pytest.mark.parametrize("here", [SOUND, SICK])
def test_ready_and_live_are_about_this_router_alone(here: GenerationHealth) -> None:
    source = Source([], ["nobody answers"], here)
    ready = get(source, "/ready")
    assert ready.status_code == (200 if here.ok else 503)
    assert ready.headers.get("retry-after") == (None if here.ok else "3")
    assert ready.json()["reason"] == here.reason
    live = get(source, "/live")
    assert (live.status_code, live.json()) == (200, {"status": "ok"})


def test_who_asks_meanwhile_gets_the_same_answer() -> None:
    async def run() -> None:
        go_on, asked = asyncio.Event(), 0

        async def ask() -> int:
            nonlocal asked
            asked += 1
            await go_on.wait()
            return asked

        shared: Shared[int] = Shared(ask)
        waiting: list[Any] = [asyncio.ensure_future(shared()) for _ in range(5)]
        await asyncio.sleep(0)
        waiting[0].cancel()  # a client that hangs up takes nobody along
        go_on.set()
        assert await within(asyncio.gather(*waiting[1:]), "the shared answer") == [1, 1, 1, 1]
        assert await shared() == 2, "who asks later gets an answer of its own"

    run_async(run())
