"""Limits of keys as the `openai` package meets them, at two gates that share a ledger."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from cluster.http.asked import asked_of
from cluster.http.quota import HEADERS, duration
from cluster.keys.keyring import Limits
from cluster.keys.messages import Answer, Report, Totals
from tests.support.key_doors import Door, doors
from tests.support.waiting import run_async


async def refused(door: Door, **more: Any) -> openai.RateLimitError:
    with pytest.raises(openai.RateLimitError) as caught:
        await door.ask("sk-team", **more)
    return caught.value


def test_the_openai_package_sees_its_quota_used_up_at_two_routers_together() -> None:
    async def act() -> None:
        pair = doors(Limits(requests_per_minute=10), count=2)
        for index in range(10):
            answer = await pair[index % 2].ask("sk-team")
            assert answer.headers["x-ratelimit-limit-requests"] == "10"
            assert answer.headers["x-ratelimit-remaining-requests"] == str(9 - index)
            assert "x-ratelimit-limit-tokens" not in answer.headers
        for door in pair:
            error = await refused(door)
            assert error.code == "rate_limit_exceeded"
            assert error.type == "requests"
            headers = error.response.headers
            assert 58 <= int(headers["retry-after"]) <= 62
            assert headers["x-ratelimit-remaining-requests"] == "0"
            assert headers["x-ratelimit-reset-requests"] in ("1m0s", "1m1s", "1m2s")
            assert f"again in {headers['retry-after']} s" in error.message
            await door.ask("sk-free")
        pair[0].clock.now_s += int(headers["retry-after"])
        await pair[0].ask("sk-team")
        assert pair[0].leases.usage["team"] == Totals(6, 60, 30, refused=1)
        assert pair[1].leases.usage["team"] == Totals(5, 50, 25, refused=1)
        for door in pair:
            await door.leases.close()
        said = (await pair[0].ledger.usage()).routers
        assert {router: usage["team"].requests for router, usage in said.items()} == {"r0": 6, "r1": 5}

    run_async(act())


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_charged_by_what_the_engine_took(stream: bool) -> None:
    """Each request may take 1 + 100 and takes 15; between two of them the ledger hears of it."""

    async def act() -> None:
        [door] = doors(Limits(tokens_per_minute=200))
        for _ in range(6):
            answer = await door.ask("sk-team", max_tokens=100, stream=stream)
            if stream:
                await answer.aread()
        assert door.leases.usage["team"] == Totals(6, 60, 30)
        error = await refused(door, max_tokens=130)
        assert error.type == "tokens"
        assert error.response.headers["x-ratelimit-remaining-tokens"] == str(200 - 6 * 15)
        error = await refused(door, max_tokens=1000)
        assert "1001 tokens, more than the 200 a minute of team" in error.message
        assert error.response.headers["x-should-retry"] == "false"

    run_async(act())


def test_a_request_that_never_came_to_the_engine_costs_no_tokens() -> None:
    async def act() -> None:
        [door] = doors(Limits(tokens_per_minute=200))
        for _ in range(5):
            with pytest.raises(openai.BadRequestError):
                await door.ask("sk-team", prompt="wrong", max_tokens=150)
        assert door.leases.usage["team"] == Totals(5)

    run_async(act())


def test_so_many_requests_run_at_a_time_at_two_routers_together() -> None:
    async def act() -> None:
        pair = doors(Limits(concurrency=3), count=2)
        for door in pair:
            door.go_on.clear()
        running = [asyncio.create_task(pair[index % 2].ask("sk-team")) for index in range(3)]
        while sum(door.waiting for door in pair) < 3:
            await asyncio.sleep(0.001)
        for door in pair:
            error = await refused(door)
            assert (error.type, error.response.headers["retry-after"]) == ("concurrency", "1")
        pair[0].go_on.set()
        await running[0]
        while True:
            try:
                await pair[0].ask("sk-team")
                break
            except openai.RateLimitError:
                await asyncio.sleep(0.001)
        pair[1].go_on.set()
        await asyncio.gather(*running)

    run_async(act())


def test_without_the_ledger_each_router_goes_on_with_its_share() -> None:
    async def act() -> None:
        pair = doors(Limits(requests_per_minute=10), count=2)
        for _ in range(2):
            for door in pair:
                await door.ask("sk-team")
        for door in pair:
            door.lost = True
            let_in = 0
            while door.leases.limits_by == "leases" or let_in < 3:
                await door.ask("sk-team")
                let_in += 1
            assert let_in == 3, "half of the limit, less what was used"
            await refused(door)
            assert door.leases.limits_by == "shares"
        pair[0].lost = False
        while pair[0].leases.limits_by == "shares":
            await asyncio.sleep(0.01)

    run_async(act())


def test_a_ledger_that_is_silent_holds_a_request_up_for_a_bounded_time() -> None:
    async def act() -> None:
        [door] = doors(Limits(requests_per_minute=10))

        async def silent(report: Report) -> Answer:
            await asyncio.Event().wait()
            raise AssertionError

        door.leases.settle = silent
        assert (await door.ask("sk-team")).status_code == 200
        assert door.leases.limits_by == "shares"

    run_async(act())


def test_a_key_has_its_models() -> None:
    async def act() -> None:
        [door] = doors(Limits(), models=frozenset({"other"}))
        with pytest.raises(openai.NotFoundError) as caught:
            await door.ask("sk-team", model="m")
        assert caught.value.code == "model_not_found"
        assert "it may use other" in caught.value.message
        assert (await door.ask("sk-team", model="other")).status_code == 200
        assert door.leases.usage["team"].refused == 1
        assert not set(HEADERS) & set((await door.ask("sk-free")).headers), "no limits, no headers"

    run_async(act())


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"prompt": "x" * 40, "max_tokens": 7}, 17),
        ({"prompt": [1, 2, 3], "max_tokens": 7}, 10),
        ({"prompt": [[1, 2], [3]], "max_tokens": 7}, 3 + 14),
        ({"prompt": ["abcd", "efgh"], "n": 3, "max_tokens": 2}, 2 + 12),
        ({"messages": [{"role": "user", "content": "x" * 36}], "max_completion_tokens": 5}, 15),
        ({"messages": [{"content": [{"url": "data:" + "x" * 99_999}]}], "max_tokens": 1}, 1025),
        ({"input": "abcd", "max_output_tokens": 10**9}, 1 + 4096),
        ({"prompt": "abcd"}, 1 + 512),
        ({"prompt": 5, "max_tokens": "many", "n": True}, 512),
        ([], 512),
    ],
)
def test_what_a_request_may_take(body: Any, tokens: int) -> None:
    assert asked_of(body).tokens(4096, generates=True) == tokens


@pytest.mark.parametrize(("seconds", "text"), [(0, "0ms"), (0.25, "250ms"), (1, "1s"), (59.2, "1m0s"), (62, "1m2s")])
def test_durations_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
