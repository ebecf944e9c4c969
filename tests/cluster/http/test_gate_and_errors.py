"""The gate and the error format on a FastAPI app without Ray or an engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, HTTPException
from fastapi.responses import PlainTextResponse, StreamingResponse
from pydantic import BaseModel, Field
from ray.exceptions import RayError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from cluster.http.errors import OpenAIApp, UnavailableError, add_error_handlers, error_body, response_for
from cluster.http.gate import Gate
from cluster.keys.keyring import Keyring, digest_of
from tests.support.waiting import run_async, within


class Body(BaseModel):
    max_tokens: int = Field(default=1, ge=0)


def make_app(keys: frozenset[str] = frozenset(), max_pending: int = 2) -> tuple[FastAPI, dict[str, asyncio.Event]]:
    app = OpenAIApp()
    events = {"entered": asyncio.Event(), "go_on": asyncio.Event()}
    add_error_handlers(app, retry_after_s=7)
    ring = Keyring().with_unnamed("unnamed", "client", map(digest_of, keys))
    app.add_middleware(
        Gate, keys=lambda: ring, max_pending=max_pending, retry_after_s=7, limited_paths=["/v1/completions"]
    )

    @app.post("/v1/completions")
    async def completions(body: Body) -> dict[str, int]:
        events["entered"].set()
        await events["go_on"].wait()
        return {"max_tokens": body.max_tokens}

    @app.get("/v1/models")
    async def models() -> list[str]:
        return ["m"]

    @app.get("/health")
    async def health() -> str:
        return "ok"

    @app.get("/broken-stream")
    async def broken_stream() -> StreamingResponse:
        async def chunks() -> AsyncIterator[str]:
            yield "data: 1\n\n"
            raise ValueError("the second chunk is missing")

        return StreamingResponse(chunks(), media_type="text/event-stream")

    @app.get("/fail/{kind}")
    async def fail(kind: str) -> None:
        raise {
            "value": ValueError("top_p is 7"),
            "secret": KeyError("internal detail"),
            "not_found": HTTPException(404, "no model x"),
            "ray": RayError("actor died at 10.0.0.1"),
            "queue": BackPressureError(3, 2),
            "no_router": DeploymentUnavailableError(DeploymentID("Router", "llm")),
            "timeout": TimeoutError(),
            "lost": UnavailableError("a router did not answer mesh_trace in 5 s"),
        }[kind]

    # What Serve does with an app that it is given.
    for serves_own in (BackPressureError, DeploymentUnavailableError):
        app.add_exception_handler(serves_own, lambda *_: PlainTextResponse("overloaded", 503))
    return app, events


def client(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://mesh")


def check_error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"{", "not JSON"),
        (b'{"max_tokens": -1}', "max_tokens: Input should be greater than or equal to 0"),
        (b"[]", "Input should be a valid dictionary"),
        (b"", "Field required"),
    ],
)
def test_bad_bodies_are_400(body: bytes, expected: str) -> None:
    async def run() -> None:
        async with client(make_app()[0]) as http:
            response = await http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
            error = check_error(response, 400)
            assert expected in error["message"]
            assert error["type"] == "invalid_request_error"

    run_async(run())


@pytest.mark.parametrize(
    ("kind", "status", "told", "untold"),
    [
        ("value", 400, "top_p is 7", "Traceback"),
        ("secret", 500, "internal error", "internal detail"),
        ("not_found", 404, "no model x", "Traceback"),
        ("ray", 503, "try again", "10.0.0.1"),
        ("queue", 503, "queued", "Traceback"),
        ("no_router", 503, "no router is available", "Traceback"),
        ("timeout", 503, "no answer in time", "Traceback"),
        ("lost", 503, "a router did not answer mesh_trace in 5 s", "Traceback"),
    ],
)
def test_exceptions_become_errors_that_tell_what_helps(kind: str, status: int, told: str, untold: str) -> None:
    async def run() -> None:
        async with client(make_app()[0]) as http:
            response = await http.get(f"/fail/{kind}")
            error = check_error(response, status)
            assert told in error["message"]
            assert untold not in response.text
            assert response.headers.get("retry-after") == ("7" if status == 503 else None)

    run_async(run())


def test_an_error_in_mid_stream_is_its_last_event() -> None:
    async def run() -> None:
        async with client(make_app()[0]) as http:
            first, error, done = (await http.get("/broken-stream")).text.strip().split("\n\n")
            assert (first, done) == ("data: 1", "data: [DONE]")
            assert json.loads(error.removeprefix("data: "))["error"]["message"] == "the second chunk is missing"

    run_async(run())


def test_unknown_paths_are_404_in_the_same_format() -> None:
    async def run() -> None:
        async with client(make_app()[0]) as http:
            check_error(await http.get("/v1/nothing"), 404)
            check_error(await http.get("/v1/completions"), 405)

    run_async(run())


@pytest.mark.parametrize(
    ("header", "admitted"),
    [("Bearer k1", True), ("bearer k2", True), ("Bearer k3", False), ("k1", False), ("Basic k1", False), (None, False)],
)
def test_keys(header: str | None, admitted: bool) -> None:
    async def run() -> None:
        async with client(make_app(frozenset({"k1", "k2"}))[0]) as http:
            headers = {} if header is None else {"authorization": header}
            response = await http.get("/v1/models", headers=headers)
            if admitted:
                assert response.status_code == 200
            else:
                assert check_error(response, 401)["code"] == "invalid_api_key"
            assert (await http.get("/health")).status_code == 200, "probes need no key"

    run_async(run())


KEY = "sk-0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize(
    ("key", "admitted"),
    [
        (KEY, True),
        (f"  {KEY} ", True),
        (KEY[:-1], False),
        (KEY[:-1] + "e", False),
        (KEY[:16], False),
        (KEY[:16] + KEY[:16], False),
        (KEY + "0", False),
        ("x" + KEY[1:], False),
        (KEY.upper(), False),
        ("", False),
    ],
)
def test_every_character_of_a_key_counts(key: str, admitted: bool) -> None:
    async def run() -> None:
        async with client(make_app(frozenset({"another", KEY}))[0]) as http:
            response = await http.get("/v1/models", headers={"authorization": f"Bearer {key}"})
            assert response.status_code == (200 if admitted else 401)

    run_async(run())


def test_without_keys_everyone_may() -> None:
    async def run() -> None:
        async with client(make_app()[0]) as http:
            assert (await http.get("/v1/models")).status_code == 200

    run_async(run())


def test_over_the_limit_is_503_and_the_slot_comes_back() -> None:
    async def run() -> None:
        app, events = make_app(max_pending=1)
        async with client(app) as http:
            first = asyncio.create_task(http.post("/v1/completions", json={"max_tokens": 3}))
            await within(events["entered"].wait(), "the first request to be admitted")
            refused = await within(http.post("/v1/completions", json={}), "the second request to be refused", 10)
            assert check_error(refused, 503)["code"] == "queue_full"
            assert refused.headers["retry-after"] == "7"
            assert (await http.get("/v1/models")).status_code == 200, "only generation counts"
            events["go_on"].set()
            assert (await within(first, "the first request to end")).json() == {"max_tokens": 3}
            assert (await http.post("/v1/completions", json={})).status_code == 200

    run_async(run())


def test_a_cancelled_request_gives_its_slot_back() -> None:
    async def run() -> None:
        app, events = make_app(max_pending=1)
        async with client(app) as http:
            first = asyncio.create_task(http.post("/v1/completions", json={}))
            await within(events["entered"].wait(), "the first request to be admitted")
            first.cancel()
            await within(asyncio.gather(first, return_exceptions=True), "the cancelled request to end")
            events["go_on"].set()
            assert (await http.post("/v1/completions", json={})).status_code == 200

    run_async(run())


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("prompt is too long"), 400), (BackPressureError(3, 2), 503), (KeyError("engine"), 503)],
)
def test_an_error_of_a_router_is_the_clients_fault_only_if_it_says_so(error: Exception, status: int) -> None:
    class RemoteError(RayError):
        cause = error

    assert response_for(RemoteError(), 1).status_code == status


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (400, "invalid_request_error", None),
        (401, "invalid_request_error", "invalid_api_key"),
        (404, "invalid_request_error", "not_found"),
        (405, "invalid_request_error", "method_not_allowed"),
        (413, "invalid_request_error", "request_too_large"),
        (500, "server_error", None),
        (503, "overloaded_error", None),
    ],
)
def test_types_and_codes_are_openais(status: int, kind: str, code: str | None) -> None:
    body = {"message": "m", "type": kind, "param": None, "code": code}
    assert error_body(status, "m") == {"error": body}
    assert error_body(status, "m", "p", "c") == {"error": {**body, "param": "p", "code": "c"}}
