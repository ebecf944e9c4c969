"""/health over routers that are made up, and models that are not served."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from cluster.http.errors import OpenAIApp, add_error_handlers
from cluster.router.client import RouterClient
from cluster.router.messages import GenerationHealth
from tests.support.router_handle import RouterHandle
from tests.support.waiting import run_async

openai_api = pytest.importorskip("cluster.http.openai_api", reason="ray.serve.llm needs vllm")

PROBE_S = -4.8  # /health adds 5 s to it
SOUND = GenerationHealth(True, "a", "", "recent token", epoch=3, connected=[0], lost={1: "gone"})
SICK = GenerationHealth(False, "b", "no token within 10.0 s", "probe")


class Ingress(openai_api.ExpertMeshIngress):
    """The ingress of made-up routers; `replicas` may be why there are none."""

    def __init__(self, replicas: list[Any] | Exception) -> None:
        self._config = SimpleNamespace(
            deadlines=SimpleNamespace(probe_s=PROBE_S), http=SimpleNamespace(retry_after_s=3)
        )
        self._model_cards = {"tiny-moe": SimpleNamespace()}
        self._default_serve_handles = {"tiny-moe": SimpleNamespace(options=lambda **_: self.opened.append(1))}
        self._configured_serve_handles: dict[str, Any] = {}
        self.opened: list[int] = []
        self._routers = RouterClient(RouterHandle(replicas))  # type: ignore[arg-type]


def get(app: OpenAIApp, path: str) -> httpx.Response:
    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://mesh") as client:
            return await asyncio.wait_for(client.get(path), 30)

    return run_async(run())


@pytest.mark.parametrize(
    ("replicas", "status", "reason", "shown"),
    [
        ([SOUND], 200, "", ["a"]),
        ([SOUND, SICK], 503, "b: no token within 10.0 s", ["a", "b"]),
        ([SOUND, None], 503, "a router did not answer generation_health in 0.2 s", ["a"]),
        ([SICK, None], 503, "a router did not answer generation_health in 0.2 s; b: no token within 10.0 s", ["b"]),
        ([], 503, "there is no router yet", []),
    ],
)
def test_health_is_that_of_every_router(replicas: list[Any], status: int, reason: str, shown: list[str]) -> None:
    app = OpenAIApp()
    openai_api.ENDPOINTS["health"](app)(Ingress(replicas).health)
    response = get(app, "/health")
    assert response.status_code == status
    assert response.headers.get("retry-after") == (None if status == 200 else "3")
    body = response.json()
    assert (body["status"], body["reason"]) == ("ok" if status == 200 else "unavailable", reason)
    assert [router["router_id"] for router in body["routers"]] == shown
    if SOUND in replicas:
        assert body["routers"][0] == {
            **{"ok": True, "router_id": "a", "reason": "", "how": "recent token"},
            **{"epoch": 3, "connected": [0], "lost": {"1": "gone"}},
        }


@pytest.mark.parametrize("model", ["other", "tiny-moe:x", "tiny-moe:", ":"])
def test_models_that_are_not_served_are_404_and_leave_nothing_behind(model: str) -> None:
    mesh = Ingress([])
    app = OpenAIApp()
    add_error_handlers(app, 3)

    @app.get("/ask")
    async def ask() -> None:
        async for _ in mesh._get_response(body=SimpleNamespace(model=model), call_method="completions"):
            pass

    response = get(app, "/ask")
    assert response.status_code == 404, response.text
    assert f'Could not find base model with ID "{model}"' in response.json()["error"]["message"]
    assert (mesh._configured_serve_handles, mesh.opened) == ({}, [])
