"""A key behind a gateway: one limit over all models and versions, which their routers count with one ledger."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from cluster.keys.command import line_of
from cluster.keys.keyring import Limits
from tests.support.gateway_scene import gateway
from tests.support.key_doors import Door, doors
from tests.support.waiting import run_async

MODELS = {
    "one": {"versions": {"stable": {"app": "one"}, "canary": {"app": "one-canary", "weight": 0}}},
    "two": {"versions": {"only": {"app": "two"}}},
}


class KeepingRouter:
    """A router's gate below a route prefix of its own, on a port of its own."""

    def __init__(self, app: str, door: Door) -> None:
        self.app, self.door, self.port = app, door, 0
        routes = [Route("/-/routes", self._routes), Mount(f"/models/{app}", app=door.app)]
        self._server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), port=0, log_level="error"))
        # Servers that end in another order than they began in would leave each other's handlers behind.
        self._server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
        self._serving: Any = None

    async def start(self) -> None:
        self._serving = asyncio.create_task(self._server.serve())
        while not self._server.started:
            await asyncio.sleep(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]

    async def stop(self) -> None:
        self._server.should_exit = True
        await self._serving

    async def _routes(self, _: Request) -> JSONResponse:
        return JSONResponse({f"/models/{self.app}": self.app})


@contextlib.asynccontextmanager
async def service(keys: Path, limits: Limits) -> AsyncIterator[tuple[openai.AsyncOpenAI, list[Door]]]:
    """A client with the key sk-team at a gateway before two models, of which one has two versions, and their gates."""
    keys.write_text(line_of("sk-team", name="team"))
    gates = doors(limits, count=3)
    routers: list[Any] = [
        KeepingRouter(app, gate) for app, gate in zip(("one", "one-canary", "two"), gates, strict=True)
    ]
    async with gateway(MODELS, routers, {"keys_file": str(keys)}) as scene:
        url = f"{scene.client.base_url}/v1"
        async with openai.AsyncOpenAI(api_key="sk-team", base_url=url, max_retries=0) as client:
            yield client, gates


async def ask(client: openai.AsyncOpenAI, model: str, max_tokens: int = 16, version: str = "") -> dict[str, str]:
    """Headers of a completion. Raises openai's error."""
    answer = await client.completions.with_raw_response.create(
        model=model,
        prompt="def",
        max_tokens=max_tokens,
        extra_headers={"x-expertmesh-version": version} if version else {},
    )
    return dict(answer.headers)


def test_requests_to_all_models_and_versions_count_together(tmp_path: Path) -> None:
    async def act() -> None:
        async with service(tmp_path / "keys.yaml", Limits(requests_per_minute=6)) as (client, gates):
            for left, (model, version) in zip(
                range(5, -1, -1), [("one", "stable"), ("two", ""), ("one", "canary")] * 2, strict=True
            ):
                headers = await ask(client, model, version=version)
                assert headers["x-ratelimit-remaining-requests"] == str(left)
            for model, version in (("one", "stable"), ("one", "canary"), ("two", "")):
                with pytest.raises(
                    openai.RateLimitError, match="team is at its limit of 6 requests a minute"
                ) as caught:
                    await ask(client, model, version=version)
                assert int(caught.value.response.headers["retry-after"]) > 50
            assert [gate.leases.usage["team"].requests for gate in gates] == [2, 2, 2]

    run_async(act())


def test_tokens_of_one_model_are_missing_at_the_other(tmp_path: Path) -> None:
    """Each request may take 1 + 100 tokens and takes 15 of 200, of which the ledger hears within a second."""

    async def act() -> None:
        async with service(tmp_path / "keys.yaml", Limits(tokens_per_minute=200)) as (client, gates):
            await ask(client, "one", max_tokens=100)
            while True:
                try:
                    await ask(client, "two", max_tokens=100)
                    break
                except openai.RateLimitError:
                    await asyncio.sleep(0.05)
            with pytest.raises(openai.RateLimitError, match="200 tokens a minute, of which this request may take 161"):
                await ask(client, "one", max_tokens=160)
            assert [gates[at].leases.usage["team"].completion_tokens for at in (0, 2)] == [5, 5]

    run_async(act())
