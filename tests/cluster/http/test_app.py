"""The front door on an app like vLLM's: what a request meets where keys have names, and that it meets nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

pytest.importorskip("vllm", reason="vLLM's HTTP side")

from cluster.config.http_sections import HttpSection
from cluster.http.app import front_door
from cluster.http.metering import METER, Meter
from cluster.http.quota import Quota
from cluster.keys.command import line_of
from cluster.keys.deployment import KeyLedger
from cluster.keys.leases import Leases
from cluster.keys.ledger import YOUNG_S
from cluster.keys.messages import Totals
from tests.support.waiting import run_async


class Engine:
    """Makes two tokens of a prompt of three, or pools it."""

    def __init__(self, runner_type: str = "generate") -> None:
        self.model_config = SimpleNamespace(max_model_len=4096, runner_type=runner_type)
        self.engine_core = SimpleNamespace(add_request_async=self.add_request)

    async def add_request(self, request_id: str, prompt: Any, params: Any) -> None:
        """What the front door guards."""

    async def generate(self, prompt: Any, params: Any) -> AsyncIterator[Any]:
        for made in (1, 2):
            part = SimpleNamespace(index=0, token_ids=[1] * made, finish_reason=None)
            yield SimpleNamespace(prompt_token_ids=[1] * 3, outputs=[part])

    async def encode(self, prompt: Any, params: Any) -> AsyncIterator[Any]:
        yield SimpleNamespace(prompt_token_ids=[1] * 3, finished=True, outputs=SimpleNamespace(data=torch.ones(2)))


def built(http: HttpSection, leases: Leases | None = None, runner_type: str = "generate") -> FastAPI:
    app = FastAPI()
    app.state.engine_client = Engine(runner_type)
    app.add_middleware(CORSMiddleware, allow_origins=["*"])

    @app.post("/pooling")
    async def pooling() -> dict[str, int]:
        return {"pooled": len([None async for _ in app.state.engine_client.encode("x", None)])}

    @app.post("/v1/completions")
    async def completions() -> dict[str, int]:
        params: Any = SimpleNamespace(output_kind=SimpleNamespace(name="CUMULATIVE"))
        return {"tokens": len([None async for _ in app.state.engine_client.generate("x", params)])}

    health: Any = SimpleNamespace(all_routers=None, ready=None)
    return front_door(app, http=http, model_id="m", health=health, leases=leases)


async def post(app: FastAPI, key: str = "", path: str = "/v1/completions") -> httpx.Response:
    headers = {"Origin": "http://elsewhere", **({"Authorization": f"Bearer {key}"} if key else {})}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://mesh") as client:
        call = client.post(path, json={"prompt": "abcd", "max_tokens": 2}, headers=headers)
        return await asyncio.wait_for(call, 30)


def test_with_named_keys_a_request_is_counted_and_limited(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(line_of("sk-team", name="team", requests_per_minute=2, tokens_per_minute=100))

    async def act() -> None:
        now_s = [0.0]
        ledger = KeyLedger(lambda: now_s[0])
        now_s[0] += YOUNG_S
        leases = Leases("r", ledger.settle, clock=lambda: now_s[0])
        app = built(HttpSection(keys_file=str(file)), leases)
        assert (await post(app)).status_code == 401
        for left in (1, 0):
            answer = await post(app, "sk-team")
            assert (answer.status_code, answer.headers["x-ratelimit-remaining-requests"]) == (200, str(left))
        refused = await post(app, "sk-team")
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "requests")
        assert leases.usage == {"team": Totals(2, 6, 4, refused=1)}
        assert app.state.expertmesh_keys.problem == ""
        await leases.close()

    run_async(act())


def test_what_is_pooled_is_counted_and_its_estimate_has_no_answer(tmp_path: Path) -> None:
    """A prompt of one token by its length, three by the engine; a completion's estimate would be above the limit."""
    file = tmp_path / "keys.yaml"
    file.write_text(line_of("sk-team", name="team", tokens_per_minute=2))

    async def act() -> None:
        now_s = [0.0]
        ledger = KeyLedger(lambda: now_s[0])
        now_s[0] += YOUNG_S
        leases = Leases("r", ledger.settle, clock=lambda: now_s[0])
        app = built(HttpSection(keys_file=str(file)), leases, "pooling")
        absent = await post(app, "sk-team")
        assert (absent.status_code, absent.json()["error"]["code"]) == (404, "unknown_url"), "it generates nothing"
        assert (await post(app, "sk-team", "/pooling")).json() == {"pooled": 1}
        assert leases.usage == {"team": Totals(2, 3, 0)}
        await leases.close()

    run_async(act())


@pytest.mark.parametrize("api_keys", [[], ["sk-plain"]])
def test_without_names_of_keys_nothing_is_counted_and_the_engine_is_left_alone(api_keys: list[str]) -> None:
    leases = Leases("r", None)
    app, meter = built(HttpSection(api_keys=api_keys), leases), Meter()
    assert Quota not in [middleware.cls for middleware in app.user_middleware]

    async def act() -> httpx.Response:
        METER.set(meter)
        return await post(app, "sk-plain")

    answer = run_async(act())
    assert (meter.tokens, leases.usage) == (0, {})
    assert answer.json() == {"tokens": 2}
    assert not [name for name in answer.headers if name.startswith("x-ratelimit")]


@pytest.mark.parametrize(("origins", "allowed"), [([], None), (["http://elsewhere"], "http://elsewhere")])
def test_pages_of_other_origins_read_nothing_unless_they_are_named(origins: list[str], allowed: str | None) -> None:
    answer = run_async(post(built(HttpSection(cors_origins=origins))))
    assert answer.status_code == 200
    assert answer.headers.get("access-control-allow-origin") == allowed
