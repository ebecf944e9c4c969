"""The ingress as it is put together: which paths there are, and which of them need a key."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cluster.config.apps import LLMAppConfig
from cluster.config.parse import parse
from cluster.controller import client as controller_client
from cluster.ingress import build_app
from tests.support.router_handle import RouterHandle

TINY = Path(__file__).parents[2] / "configs" / "tiny-cpu.yaml"
PATHS = {
    *("GET /v1/models", "GET /v1/models/{model:path}", "POST /v1/completions", "POST /v1/chat/completions"),
    *("POST /tokenize", "POST /detokenize", "GET /health", "GET /metrics"),
    *("GET /expertmesh/status", "GET /expertmesh/placement", "GET /expertmesh/trace", "DELETE /expertmesh/trace"),
}


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The app with a key, over no router and no controller."""
    pytest.importorskip("ray.serve.llm", reason="ray.serve.llm needs vllm")

    def no_controller(*_: Any) -> Any:
        raise RuntimeError("nobody asks it here")

    class Handle(RouterHandle):
        def options(self, **_: Any) -> Handle:
            return self

        def __getattr__(self, name: str) -> Any:
            return no_controller

    monkeypatch.setattr(controller_client.serve, "get_deployment_handle", lambda *_: Handle([]))
    args = yaml.safe_load(TINY.read_text())["applications"][1]["args"]
    args["http"] = {**args.get("http", {}), "api_keys": ["secret"], "retry_after_s": 4}
    routers: Any = Handle([])
    return build_app(parse(LLMAppConfig, args), routers)


def test_every_endpoint_is_there_and_only_some_need_no_key(app: Any) -> None:
    own = {"/docs", "/openapi.json", "/redoc", "/docs/oauth2-redirect"}
    found = {f"{method} {route.path}" for route in app.routes if route.path not in own for method in route.methods}
    assert found == PATHS

    async def ask() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://mesh") as client:
            key = {"Authorization": "Bearer secret"}
            for path in ("/health", "/metrics"):
                assert (await client.get(path)).status_code != 401
            for path in ("/v1/models", "/expertmesh/status", "/expertmesh/placement", "/expertmesh/trace"):
                assert (await client.get(path)).status_code == 401
                assert (await client.get(path, headers=key)).status_code != 401
            health = await client.get("/health", headers={"Origin": "http://elsewhere"})
            assert health.json()["reason"] == "there is no router yet"
            assert (health.headers["retry-after"], health.headers["access-control-allow-origin"]) == ("4", "*")

    asyncio.run(asyncio.wait_for(ask(), 60))
