"""Pairs between processes on different hosts: TCP over their common interface, and a host that is cut off."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.serving.hosts import Host, NamespacesRefusedError, enter, hosts_on_a_switch
from experts.protocol.errors import ShardError
from experts.protocol.membership import ShardEndpoint
from experts.transports.base import RouterLink
from experts.transports.connect import connect
from tests.support.echo_shard import HOLD, EchoShard, context, counted_up, echo_shard, hello_for, post_body, reply_body
from tests.support.waiting import await_true

pytestmark = pytest.mark.cluster
LONG_S = 30.0


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(hosts_on_a_switch(3))
        except NamespacesRefusedError as refused:
            pytest.skip(f"no network namespaces here: {refused}")
        yield made


@pytest.fixture
def shards(hosts: list[Host]) -> Iterator[list[EchoShard]]:
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(echo_shard(rank, host.address, netns=host.name)) for rank, host in enumerate(hosts[1:])
        ]


class Router:
    """A router's process on the first host; runs one command at a time and returns the result."""

    def __init__(self, host: Host) -> None:
        self.pipe, theirs = context().Pipe()
        self.process = context().Process(target=_route, args=(host.name, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, *command: Any) -> Any:
        """The command's result, or (class name, reason) of a ShardError."""
        self.pipe.send(command)
        if not self.pipe.poll(LONG_S):
            raise TimeoutError(f"the router did not answer {command}")
        return self.pipe.recv()

    def end(self) -> None:
        self.process.kill()
        self.process.join(LONG_S)


@pytest.fixture
def router(hosts: list[Host]) -> Iterator[Router]:
    router = Router(hosts[0])
    yield router
    router.end()


def _route(netns: str, pipe: Any) -> None:
    enter(netns)
    links: dict[int, RouterLink] = {}
    while True:
        try:
            command, rank, *details = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(_COMMANDS[command](links, rank, *details))
        except ShardError as error:
            pipe.send((type(error).__name__, error.reason))


def _connect(links: dict[int, RouterLink], rank: int, endpoint: ShardEndpoint, transport: str, timeout_s: float) -> str:
    links[rank] = connect(endpoint, hello_for(transport), "cpu", 20.0, time.monotonic() + timeout_s)
    return links[rank].transport


def _turn(links: dict[int, RouterLink], rank: int, body: bytes, timeout_s: float) -> bytes:
    post_body(links[rank], body)
    return reply_body(links[rank], links[rank].wait(time.monotonic() + timeout_s))


def _hold(links: dict[int, RouterLink], rank: int) -> str:
    post_body(links[rank], b"abc", HOLD)
    return "posted"


def _await(links: dict[int, RouterLink], rank: int, timeout_s: float) -> int:
    return links[rank].wait(time.monotonic() + timeout_s)


def _close(links: dict[int, RouterLink], rank: int) -> str:
    links.pop(rank).close()
    return "closed"


_COMMANDS: dict[str, Any] = {"connect": _connect, "turn": _turn, "hold": _hold, "await": _await, "close": _close}


@pytest.mark.parametrize("transport", ["auto", "tcp", "gloo_split"])
def test_hosts_are_joined_by_tcp(shards: list[EchoShard], router: Router, transport: str) -> None:
    expected = "tcp" if transport == "auto" else transport
    for rank, shard in enumerate(shards):
        assert router.ask("connect", rank, shard.endpoint, transport, LONG_S) == expected
    for turn in range(50):
        body = bytes([turn]) * (1 + 997 * turn)
        for rank in range(len(shards)):
            assert router.ask("turn", rank, body, LONG_S) == counted_up(body)


def test_what_crosses_a_link_is_counted_and_can_be_limited(
    hosts: list[Host], shards: list[EchoShard], router: Router
) -> None:
    router.ask("connect", 0, shards[0].endpoint, "auto", LONG_S)
    for mbit_per_s in (1000, 500, None, None):
        hosts[0].limit(mbit_per_s)
        sent, received = hosts[0].link_bytes()
        body = bytes(range(256)) * 200
        assert router.ask("turn", 0, body, LONG_S) == counted_up(body)
        sent, received = (after - before for after, before in zip(hosts[0].link_bytes(), (sent, received), strict=True))
        assert len(body) < sent < 2 * len(body)
        assert len(body) < received < 2 * len(body)


def test_shared_memory_is_refused_across_hosts(shards: list[EchoShard], router: Router) -> None:
    kind, reason = router.ask("connect", 0, shards[0].endpoint, "shm", LONG_S)
    assert kind == "ShardRejectedError"
    assert "shared memory cannot be handed over, is this another host?" in reason


def test_a_host_cut_off_costs_its_own_pair_the_deadline(
    hosts: list[Host], shards: list[EchoShard], router: Router
) -> None:
    for rank, shard in enumerate(shards):
        router.ask("connect", rank, shard.endpoint, "auto", LONG_S)
        assert router.ask("turn", rank, b"before", LONG_S) == counted_up(b"before")
    hosts[2].cut()
    try:
        kind, reason = router.ask("turn", 1, b"lost", 0.3)
        assert (kind, reason) == ("ShardTimeoutError", "no reply over tcp before the dispatch deadline")
        assert router.ask("close", 1) == "closed"
        assert router.ask("turn", 0, b"goes on", LONG_S) == counted_up(b"goes on")
        kind, _ = router.ask("connect", 1, shards[1].endpoint, "auto", 0.3)
        assert kind == "ShardTimeoutError"
    finally:
        hosts[2].join()
    assert router.ask("connect", 1, shards[1].endpoint, "auto", LONG_S) == "tcp"
    assert router.ask("turn", 1, b"again", LONG_S) == counted_up(b"again")


def test_a_shard_killed_on_another_host_is_noticed_at_once(shards: list[EchoShard], router: Router) -> None:
    router.ask("connect", 0, shards[0].endpoint, "auto", LONG_S)
    assert router.ask("hold", 0) == "posted"
    assert shards[0].event() == ("held", "router")
    os.kill(shards[0].endpoint.pid, signal.SIGKILL)
    kind, _ = router.ask("await", 0, 3600.0)
    assert kind == "ShardLostError"


@pytest.mark.parametrize("transport", ["tcp", "gloo_split"])
def test_a_shard_forgets_a_router_whose_host_vanished(hosts: list[Host], router: Router, transport: str) -> None:
    with echo_shard(0, hosts[1].address, netns=hosts[1].name, keepalive_s=1) as shard:
        # After another test's cut, the kernel may still be asking in vain for the other host's address.
        await_true(lambda: router.ask("connect", 0, shard.endpoint, transport, LONG_S) == transport, "a pair")
        assert router.ask("turn", 0, b"before", LONG_S) == counted_up(b"before")
        hosts[0].cut()
        try:
            assert shard.event(LONG_S) == ("left", "router")
        finally:
            hosts[0].join()
