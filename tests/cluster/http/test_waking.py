"""A request that waits for the first router: answered when there is one, told after a while, never lost."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from cluster.http import waking
from cluster.http.waking import STARTING, WAITED, Waking
from cluster.serve_environment import HAPROXY_SWITCH
from tests.support.waiting import run_async

SCOPE = {"type": "http", "path": "/v1/completions", "method": "POST", "headers": []}


class Proxy:
    """Serve's proxy: hands a request to a router once there is one."""

    def __init__(self) -> None:
        self.router = asyncio.Event()
        self.cancelled = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.router.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b"answer"})


async def never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


def ask(proxy: Any, serves: bool | None, wait_s: float, act: Any = lambda: None) -> list[Message]:
    """What a client sees of one request; `act` is called while it waits."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def whole() -> None:
        asyncio.get_running_loop().call_later(0.05, act)
        await Waking(proxy, wait_s, lambda path: serves)(dict(SCOPE), never, send)

    run_async(whole(), "the answer")
    return sent


def headers(message: Message) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in message["headers"]}


def test_a_request_waits_for_the_router_and_hears_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waking, "SHOWN_FROM_S", 0.0)
    proxy = Proxy()
    start, body = ask(proxy, False, 30, proxy.router.set)
    assert (start["status"], body["body"]) == (200, b"answer")
    assert float(headers(start)[WAITED.decode()]) >= 0.0
    assert headers(start)["a"] == "b"


def test_an_answer_that_did_not_wait_stays_as_it_is() -> None:
    proxy = Proxy()
    proxy.router.set()
    start, _ = ask(proxy, False, 30)
    assert headers(start) == {"a": "b"}


def test_after_a_while_without_a_router_it_is_told_to_come_again() -> None:
    proxy = Proxy()
    start, body = ask(proxy, False, 0.1)
    assert start["status"] == 503
    assert headers(start)[STARTING] == "1"
    assert int(headers(start)["retry-after"]) == waking.AGAIN_S
    error = json.loads(body["body"])["error"]
    assert error["code"] == "router_starting"
    assert "try again" in error["message"]
    assert proxy.cancelled, "it does not wait on for nobody"


@pytest.mark.parametrize("serves", [True, None])
def test_a_request_that_a_router_may_have_is_not_cut_off(serves: bool | None) -> None:
    proxy = Proxy()
    start, _ = ask(proxy, serves, 0.01, proxy.router.set)
    assert start["status"] == 200


def test_a_failure_of_the_proxy_stays_one() -> None:
    async def fails(*_: Any) -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        ask(fails, False, 30)


@pytest.mark.parametrize(
    ("switch", "replica", "count"), [("1", False, 1), ("1", True, 0), ("0", False, 0), (None, False, 0)]
)
def test_only_in_the_proxy_behind_haproxy(
    monkeypatch: pytest.MonkeyPatch, switch: str | None, replica: bool, count: int
) -> None:
    """Elsewhere Serve's proxy takes all requests, and what takes long there is an answer."""
    monkeypatch.delenv(HAPROXY_SWITCH, raising=False)
    monkeypatch.setattr(waking, "in_replica", lambda: replica)
    if switch is not None:
        monkeypatch.setenv(HAPROXY_SWITCH, switch)
    assert [middleware.cls for middleware in waking.middlewares()] == [Waking] * count
