"""What the gate lets through, connection by connection, without a framework before or behind it."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Collection
from typing import Any

import pytest

from cluster.http.gate import Gate
from cluster.keys.keyring import Keyring, digest_of

KEYS = frozenset({"sk-team-0123456789", "sk-team-9876543210"})
GENERATION = frozenset({"/v1/completions", "/v1/chat/completions"})


class Asked:
    """One connection through a gate: what the app behind it saw and what was sent back."""

    def __init__(self, gate: Gate, seen: list[dict[str, Any]], scope: dict[str, Any]) -> None:
        self.sent: list[dict[str, Any]] = []
        before = len(seen)
        asyncio.run(asyncio.wait_for(gate(scope, self._receive, self._send), 10))
        self.passed = len(seen) == before + 1

    async def _receive(self) -> dict[str, Any]:
        return {"type": "http.request"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.sent[1]["body"])["error"]


class Door:
    """A gate with an app that only notes who comes through."""

    def __init__(self, keys: frozenset[str] = KEYS, max_pending: int = 5, more: Collection[bytes] = ()) -> None:
        self.seen: list[dict[str, Any]] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            self.seen.append(scope)

        ring = Keyring().with_unnamed("unnamed", "client", [*map(digest_of, keys), *more])
        self.gate = Gate(app, lambda: ring, max_pending, retry_after_s=9, limited_paths=GENERATION)

    def ask(self, path: str = "/v1/models", headers: list[tuple[bytes, bytes]] | None = None, **more: Any) -> Asked:
        scope = {"type": "http", "method": "GET", "path": path, "headers": headers or [], **more}
        return Asked(self.gate, self.seen, scope)


def bearer(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"mesh"), (b"authorization", f"Bearer {key}".encode("latin-1")), (b"accept", b"*/*")]


@pytest.mark.parametrize("key", sorted(KEYS))
def test_every_key_admits(key: str) -> None:
    assert Door().ask(headers=bearer(key)).passed
    assert Door().ask(headers=bearer(f"  {key} ")).passed, "space around a key is no part of it"


def test_a_key_may_be_given_as_its_digest() -> None:
    door = Door(frozenset(), more=[hashlib.sha256(b"vllms-own").digest()])
    assert door.ask(headers=bearer("vllms-own")).passed
    assert not door.ask(headers=bearer("another")).passed
    assert not door.ask().passed


def test_a_refusal_says_how_to_authenticate() -> None:
    assert Door().ask().headers[b"www-authenticate"] == b"Bearer"


KEY = "sk-team-0123456789"
NEARLY = [KEY[:n] for n in range(len(KEY))]
NEARLY += [f"{KEY}0", f"{KEY}{KEY}", KEY.upper(), "sk-team-0123456788", "xk-team-0123456789", KEY[::-1], "ÿ" * 18]
NEARLY += [KEY[:n] + "_" + KEY[n + 1 :] for n in range(len(KEY))]


@pytest.mark.parametrize("key", NEARLY)
def test_a_key_that_differs_in_one_place_or_in_length_does_not(key: str) -> None:
    refused = Door().ask(headers=bearer(key))
    assert not refused.passed
    assert (refused.status, refused.error["code"]) == (401, "invalid_api_key")
    assert refused.error["message"] == "no valid API key: send one as 'Authorization: Bearer KEY'"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"")],
        [(b"authorization", KEY.encode())],
        [(b"authorization", b"Basic " + KEY.encode())],
        [(b"authorization", b"Bearer")],
        [(b"x-api-key", b"Bearer " + KEY.encode())],
    ],
)
def test_a_key_counts_only_where_and_as_it_belongs(headers: list[tuple[bytes, bytes]]) -> None:
    assert not Door().ask(headers=headers).passed


@pytest.mark.parametrize("path", ["/health", "/ready", "/live", "/metrics", "/docs", "/openapi.json"])
def test_what_probes_and_readers_ask_needs_no_key(path: str) -> None:
    assert Door().ask(path).passed
    assert Door().ask("/prefix" + path, root_path="/prefix").passed
    assert not Door().ask(path + "/more").passed


def test_a_path_counts_without_the_prefix_it_is_mounted_under() -> None:
    door = Door(frozenset(), max_pending=0)
    assert door.ask("/mesh/v1/completions", root_path="/mesh").status == 503
    assert door.ask("/mesh/v1/completions").passed, "another path where nothing is mounted"


def test_without_keys_everybody_is_let_in() -> None:
    assert Door(frozenset()).ask().passed


def test_what_is_no_request_or_only_asks_for_what_is_allowed_passes() -> None:
    door = Door(max_pending=0)
    assert door.ask(method="OPTIONS").passed
    assert door.ask("/v1/completions", method="OPTIONS").passed
    assert Asked(door.gate, door.seen, {"type": "lifespan"}).passed


def test_a_web_socket_needs_a_key_too() -> None:
    door = Door()
    assert Asked(door.gate, door.seen, {"type": "websocket", "headers": bearer(KEY)}).passed
    refused = Asked(door.gate, door.seen, {"type": "websocket", "headers": bearer("another")})
    assert not refused.passed
    assert refused.sent == [{"type": "websocket.close", "code": 1008}]
    open_door = Door(frozenset())
    assert Asked(open_door.gate, open_door.seen, {"type": "websocket", "headers": []}).passed


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_generation_over_the_limit_is_told_when_to_come_again(path: str) -> None:
    refused = Door(max_pending=0).ask(path, headers=bearer(KEY))
    assert (refused.status, refused.headers[b"retry-after"]) == (503, b"9")
    assert refused.error == {
        "message": "0 requests are pending, which is the limit; try again",
        "type": "overloaded_error",
        "param": None,
        "code": "queue_full",
    }


def test_the_limit_counts_requests_that_run_and_nothing_else() -> None:
    """Three at a time through a limit of two: the third is refused; after them, two more go through again."""

    async def act() -> None:
        go_on, inside, sent = asyncio.Event(), [], []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            inside.append(scope["path"])
            await go_on.wait()
            if scope["fails"]:
                raise ConnectionError

        async def send(message: Any) -> None:
            sent.append(message)

        gate = Gate(app, Keyring, 2, 9, limited_paths=GENERATION)

        def begin(path: str, fails: bool = False) -> asyncio.Task[None]:
            scope = {"type": "http", "method": "POST", "path": path, "headers": [], "fails": fails}
            return asyncio.create_task(gate(scope, None, send))  # type: ignore[arg-type]

        for _ in range(3):
            inside.clear()
            sent.clear()
            go_on.clear()
            first, second = begin("/v1/completions", fails=True), begin("/v1/chat/completions")
            await asyncio.sleep(0)
            third, other = begin("/v1/completions"), begin("/v1/models")
            done, _ = await asyncio.wait({third}, timeout=10)
            assert done == {third}
            assert inside == ["/v1/completions", "/v1/chat/completions", "/v1/models"]
            assert [message["status"] for message in sent if "status" in message] == [503]
            assert b"2 requests are pending" in sent[1]["body"]
            go_on.set()
            found = await asyncio.wait_for(asyncio.gather(first, second, other, return_exceptions=True), 10)
            assert [type(one) for one in found] == [ConnectionError, type(None), type(None)]

    asyncio.run(asyncio.wait_for(act(), 60))
