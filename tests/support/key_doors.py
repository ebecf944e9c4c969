"""Gates of routers that keep limits of keys, with a made-up engine behind them and one ledger."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import openai
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp

from cluster.http.gate import Gate
from cluster.http.metering import count_tokens
from cluster.http.quota import Quota
from cluster.http.requests import BodyCheck
from cluster.http.responses import OneErrorFormat
from cluster.keys.deployment import KeyLedger
from cluster.keys.keyring import Key, Keyring, Limits, digest_of
from cluster.keys.leases import Leases
from cluster.keys.ledger import YOUNG_S
from cluster.keys.messages import Answer, Report

PATHS = ["/v1/completions", "/v1/chat/completions"]


class Clock:
    """Time that a test moves on."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Engine:
    """Makes `made` tokens of a prompt of 10, one at a time."""

    made: int = 5

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
        for index in range(self.made):
            await asyncio.sleep(0)
            ids = [1] if params.output_kind.name == "DELTA" else [1] * (index + 1)
            yield SimpleNamespace(prompt_token_ids=[0] * 10, outputs=[SimpleNamespace(index=0, token_ids=ids)])


@dataclass
class Door:
    """A gate as it stands before vLLM in one router, with a made-up app behind it."""

    keys: dict[str, Key]
    ledger: KeyLedger
    clock: Clock
    name: str = "r"
    engine: Engine = field(default_factory=Engine)

    def __post_init__(self) -> None:
        self.lost = False
        self.waiting = 0  # requests behind the gate that `go_on` holds up
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.leases = Leases(self.name, self.settle, clock=self.clock)
        count_tokens(self.engine)
        app = FastAPI()

        @app.post("/v1/completions")
        async def completions(request: Request) -> Any:
            body = await request.json()
            self.waiting += 1
            await self.go_on.wait()
            self.waiting -= 1
            if body["prompt"] == "wrong":
                return JSONResponse({"error": {"message": "no", "code": 400}}, 400)
            kind = SimpleNamespace(output_kind=SimpleNamespace(name="DELTA" if body.get("stream") else "CUMULATIVE"))

            async def chunks() -> AsyncIterator[str]:
                async for _ in self.engine.generate(body["prompt"], kind, "id"):
                    choice = {"index": 0, "text": "x", "finish_reason": None, "logprobs": None}
                    whole = {"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}
                    yield f"data: {json.dumps(whole)}\n\n"
                yield "data: [DONE]\n\n"

            if body.get("stream"):
                return StreamingResponse(chunks(), media_type="text/event-stream")
            async for _ in self.engine.generate(body["prompt"], kind, "id"):
                pass
            return {"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": []}

        ring = Keyring({digest_of(secret): key for secret, key in self.keys.items()})
        stack: ASGIApp = Quota(app, self.leases, "m", max_model_len=4096, generation_paths=PATHS)
        stack = BodyCheck(stack, max_body_bytes=2**20, max_sequences=64, max_model_len=4096, estimate=True)
        stack = Gate(stack, lambda: ring, max_pending=200, retry_after_s=1, limited_paths=PATHS)
        self.app = OneErrorFormat(stack, retry_after_s=1)

    async def settle(self, report: Report) -> Answer:
        if self.lost:
            raise ConnectionError("the ledger is gone")
        return await self.ledger.settle(report)

    def client(self, secret: str) -> openai.AsyncOpenAI:
        transport = httpx.ASGITransport(self.app)
        return openai.AsyncOpenAI(
            api_key=secret,
            base_url="http://mesh/v1",
            max_retries=0,
            http_client=httpx.AsyncClient(transport=transport, base_url="http://mesh"),
        )

    async def ask(self, secret: str, prompt: str = "def", max_tokens: int = 16, **more: Any) -> httpx.Response:
        answer = await self.client(secret).completions.with_raw_response.create(
            model=more.pop("model", "m"), prompt=prompt, max_tokens=max_tokens, **more
        )
        return answer.http_response


def doors(limits: Limits, count: int = 1, **more: Any) -> list[Door]:
    """Routers that count with one ledger, at which the key sk-team has these limits, and sk-free none."""
    clock = Clock()
    ledger = KeyLedger(clock)
    clock.now_s += YOUNG_S
    keys = {"sk-team": Key("team", limits=limits, **more), "sk-free": Key("free")}
    return [Door(keys, ledger, clock, f"r{index}") for index in range(count)]
