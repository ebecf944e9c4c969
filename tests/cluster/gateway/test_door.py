"""A gateway over HTTP: whom a request reaches, what comes back, and what happens when routers or clients go."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.gateway import pool
from cluster.keys.command import line_of
from tests.support.gateway_scene import FakeRouter, gateway
from tests.support.waiting import asynchronous, within

TWO: dict[str, Any] = {
    "m": {"versions": {"stable": {"app": "a", "weight": 3}, "canary": {"app": "b", "weight": 1}}},
    "other": {"versions": {"only": {"app": "c"}}},
}
ALONE: dict[str, Any] = {"m": {"versions": {"only": {"app": "a"}}}}


def routers() -> list[FakeRouter]:
    return [FakeRouter("a"), FakeRouter("b"), FakeRouter("c")]


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


@asynchronous
async def test_a_request_reaches_the_model_that_it_names_as_it_was_sent() -> None:
    async with gateway(TWO, routers()) as scene:
        body = b'{"model": "other",  "prompt": "\xc3\xa4"}'
        headers = {"content-type": "application/json", "authorization": "Bearer k", "x-request-id": "r1"}
        answer = await scene.client.post("/v1/chat/completions?debug=1", content=body, headers=headers)
        assert (answer.status_code, answer.json()) == (200, {"app": "c"})
        assert "x-expertmesh-version" not in answer.headers, "of one version there is nothing to tell"
        assert "access-control-allow-origin" not in answer.headers, "which origins may read is the gateway's to say"
        [(path, sent, received)] = scene.routers["c"][0].asked
        assert (path, received) == ("/v1/chat/completions?debug=1", body)
        assert (sent["authorization"], sent["x-request-id"]) == ("Bearer k", "r1")


@asynchronous
async def test_versions_get_their_shares_and_say_who_they_are() -> None:
    async with gateway(TWO, routers()) as scene:
        answers = [await scene.ask() for _ in range(8)]
        assert Counter(answer.json()["app"] for answer in answers) == {"a": 6, "b": 2}
        names = {(answer.json()["app"], answer.headers["x-expertmesh-version"]) for answer in answers}
        assert names == {("a", "stable"), ("b", "canary")}
        adapter = await scene.ask("m:lora")
        assert adapter.status_code == 200, "an adapter is its model's"


@asynchronous
async def test_other_weights_take_effect_at_once_and_a_stream_goes_on() -> None:
    async with gateway(TWO, routers()) as scene:
        body = {"model": "m", "prompt": "x", "stream": True}
        stable = {"x-expertmesh-version": "stable"}
        async with scene.client.stream("POST", "/v1/completions", json=body, headers=stable) as answer:
            chunks = answer.aiter_bytes()
            assert await within(anext(chunks), "the first chunk, before the second is there") == b"data: first\n\n"
            scene.configure({"m": {"versions": {"canary": {"app": "b"}}}})
            assert (await scene.ask()).json() == {"app": "b"}
            scene.routers["a"][0].go_on.set()
            assert b"".join([chunk async for chunk in chunks]) == b"data: second\n\ndata: [DONE]\n\n"
        assert error_of(await scene.ask("other"))["code"] == "model_not_found"


@asynchronous
async def test_a_header_names_a_version_or_keeps_a_session_at_one() -> None:
    models = {"m": {**TWO["m"], "split_by": "header", "split_header": "X-Session"}}
    async with gateway(models, routers()) as scene:
        assert (await scene.ask(x_expertmesh_version="canary")).json() == {"app": "b"}
        wrong = error_of(await scene.ask(x_expertmesh_version="nope"))
        assert wrong["message"] == "m has no version 'nope'; there are stable, canary"
        sessions = [[(await scene.ask(x_session=f"{i}")).json()["app"] for _ in range(3)] for i in range(30)]
        assert {len(set(apps)) for apps in sessions} == {1}
        assert {apps[0] for apps in sessions} == {"a", "b"}


def keys_file(folder: Path, *names: str) -> str:
    lines = [line_of(f"secret-{n}", name=n, role="client") for n in names]
    path = folder / "keys.yaml"
    path.write_text("\n".join(lines))
    return str(path)


def test_a_key_stays_with_one_version_by_its_name_and_no_log_has_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"team-{index}" for index in range(12)]

    @asynchronous
    async def ask() -> None:
        models = {"m": {**TWO["m"], "split_by": "key"}}
        async with gateway(models, routers(), {"keys_file": keys_file(tmp_path, *names)}) as scene:
            assert (await scene.ask()).status_code == 401
            assert (await scene.client.get("/v1/models")).status_code == 401, "names of models are not for everybody"
            of_key = {}
            for name in names:
                answers = [await scene.ask(authorization=f"Bearer secret-{name}") for _ in range(2)]
                of_key[name] = {answer.json()["app"] for answer in answers}
            assert {len(apps) for apps in of_key.values()} == {1}
            assert set.union(*of_key.values()) == {"a", "b"}

    with caplog.at_level("DEBUG"):
        ask()
    assert "secret-" not in caplog.text


@pytest.mark.parametrize(
    ("content", "status", "code", "words"),
    [
        (b'{"model": "nope"}', 404, "model_not_found", "`nope` does not exist. There are: m, other"),
        (b'{"prompt": "x"}', 400, "missing_required_parameter", "this address has several: m, other"),
        (b'{"model": 3}', 400, "invalid_type", "valid string"),
        (b"{", 400, "invalid_json", "not JSON"),
        (b"[" * 100_000, 400, "invalid_json", "not JSON"),
        (b'{"model": "m", "prompt": "' + b"x" * 2000 + b'"}', 413, "request_too_large", "more than 1024 bytes"),
    ],
    ids=["unknown", "none", "number", "broken", "deep", "large"],
)
def test_what_no_router_should_see_is_refused(content: bytes, status: int, code: str, words: str) -> None:
    @asynchronous
    async def ask() -> None:
        limit = 1024 if status == 413 else 1_000_000
        async with gateway(TWO, routers(), {"max_body_bytes": limit}) as scene:
            answer = await scene.client.post("/v1/completions", content=content)
            error = error_of(answer)
            assert (answer.status_code, error["code"]) == (status, code)
            assert words in error["message"]
            assert not any(router.asked for each in scene.routers.values() for router in each)

    ask()


@asynchronous
async def test_with_one_model_a_request_need_not_name_it() -> None:
    async with gateway(ALONE, [FakeRouter("a")]) as scene:
        assert (await scene.ask(None)).json() == {"app": "a"}


@asynchronous
async def test_routers_that_are_gone_cost_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "ASIDE_S", 300.0)
    first, second = FakeRouter("a"), FakeRouter("a")
    async with gateway(ALONE, [first, second]) as scene:
        await scene.ask()
        await first.stop()
        assert [(await scene.ask()).status_code for _ in range(6)] == [200] * 6
        counts = scene.models.counts["m", "only"]
        assert (counts.requests, counts.errors, counts.retries) == (7, 0, 1), "one was asked in vain, then set aside"
        second.behaviour = "dies"
        answer = await scene.ask()
        assert answer.status_code == 503, "there is no other"
        assert answer.headers["retry-after"] == "1"
        assert error_of(answer)["message"] == "no router of the model 'm' (only) answers; try again"


@asynchronous
async def test_a_version_without_routers_is_taken_over_and_another_model_is_not() -> None:
    async with gateway(TWO, routers()) as scene:
        await scene.routers["a"][0].stop()
        answers = [await scene.ask() for _ in range(4)]
        assert {answer.json()["app"] for answer in answers} == {"b"}
        counts = scene.models.counts["m", "canary"]
        assert (counts.requests, counts.errors, counts.taken_over) == (4, 0, 3)
        assert (await scene.ask(x_expertmesh_version="stable")).status_code == 503, "who names one wants no other"
        assert (await scene.ask("other")).status_code == 200
        scene.routers["c"].clear()
        assert (await scene.ask("other")).status_code == 503


@asynchronous
async def test_a_request_that_kills_its_routers_is_not_handed_to_all_of_them() -> None:
    four = [FakeRouter("a", "dies") for _ in range(4)]
    async with gateway(ALONE, four) as scene:
        assert (await scene.ask()).status_code == 503
        assert sum(len(router.asked) for router in four) == 2


@asynchronous
async def test_what_a_router_answers_is_the_answer() -> None:
    async with gateway(ALONE, [FakeRouter("a", "is_busy"), FakeRouter("a")]) as scene:
        answer = await scene.ask()
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")
        assert scene.models.counts["m", "only"].errors == 1


@asynchronous
async def test_a_stream_that_breaks_off_ends_with_an_error() -> None:
    async with gateway(ALONE, [FakeRouter("a", "breaks")]) as scene:
        scene.routers["a"][0].go_on.set()
        answer = await scene.client.post("/v1/completions", json={"model": "m", "stream": True})
        first, told, done = answer.text.strip().split("\n\n")
        assert (answer.status_code, first, done) == (200, "data: first", "data: [DONE]")
        assert json.loads(told.removeprefix("data: "))["error"]["code"] == "router_lost"
        counts = scene.models.counts["m", "only"]
        assert (counts.requests, counts.errors, counts.open) == (1, 1, 0)


@asynchronous
async def test_a_client_that_leaves_is_left_by_its_router_too() -> None:
    async with gateway(ALONE, [FakeRouter("a")]) as scene:
        async with scene.client.stream("POST", "/v1/completions", json={"model": "m", "stream": True}) as answer:
            await anext(answer.aiter_bytes())
        await within(scene.routers["a"][0].left.wait(), "the router to see that its client left")
        counts = scene.models.counts["m", "only"]
        assert (counts.requests, counts.errors, counts.open) == (1, 0, 0)


@asynchronous
async def test_more_than_the_limit_are_told_to_come_again() -> None:
    body = {"model": "m", "stream": True}
    async with (
        gateway(ALONE, [FakeRouter("a")], {"max_requests": 1, "retry_after_s": 3}) as scene,
        scene.client.stream("POST", "/v1/completions", json=body) as answer,
    ):
        await anext(answer.aiter_bytes())
        busy = await scene.ask()
        assert (busy.status_code, error_of(busy)["code"], busy.headers["retry-after"]) == (503, "queue_full", "3")
        scene.routers["a"][0].go_on.set()


@asynchronous
async def test_all_models_are_listed_with_their_adapters() -> None:
    async with gateway(TWO, routers()) as scene:
        scene.routers["c"].clear()
        listed = (await scene.client.get("/v1/models")).json()
        assert listed["object"] == "list"
        assert [card["id"] for card in listed["data"]] == ["m", "m:lora", "other"], "one without routers, too"
        assert (await scene.client.get("/v1/models/m:lora")).json() == {"id": "m:lora"}
        missing = await scene.client.get("/v1/models/nope")
        assert (missing.status_code, error_of(missing)["code"]) == (404, "model_not_found")
        nowhere = await scene.client.get("/docs")
        assert (nowhere.status_code, error_of(nowhere)["code"]) == (404, "unknown_url")


@asynchronous
async def test_health_names_who_is_sick_and_ready_waits_for_all() -> None:
    async with gateway(TWO, routers()) as scene:
        assert (await scene.client.get("/live")).status_code == 200
        for path in ("/health", "/ready"):
            answer = await scene.client.get(path)
            assert (answer.status_code, answer.json()["status"]) == (200, "ok")
        scene.routers["b"][0].behaviour = "is_busy"
        health, ready = [await scene.client.get(path) for path in ("/health", "/ready")]
        assert (health.status_code, health.json()["status"], ready.status_code) == (200, "degraded", 503)
        assert health.json()["reason"] == "m (canary): b is busy"
        scene.configure({})
        assert (await scene.client.get("/health")).status_code == 503


@asynchronous
async def test_a_stored_response_is_found_at_whoever_has_it() -> None:
    async with gateway(TWO, routers()) as scene:
        answer = await scene.client.get("/v1/responses/resp_1")
        assert answer.json()["reason"] == "a is busy", "the first that does not say 404"
