"""The control port: strangers cost little and learn nothing, members have limits, and one thread watches them all."""

from __future__ import annotations

import os
import secrets
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experts.protocol.errors import ShardLostError, ShardRejectedError
from experts.protocol.membership import ShardEndpoint, host_id
from experts.protocol.secret import SECRET_ENV, MeshSecret
from experts.transports.base import ShardChannel
from experts.transports.control import Control, Hello, LifeLine, open_control, shake_hands
from experts.transports.control_port import listener as listener_module
from experts.transports.control_port.handshake import READER
from experts.transports.control_port.listener import ControlListener
from experts.transports.control_port.visitor import OtherIncarnationError, PortLimits
from tests.support.echo_shard import deadline_in, hello_for
from tests.support.strangers import GREETING, LONG_S, OTHER_SECRET, all_from, stranger_at
from tests.support.waiting import await_true

SECRET = MeshSecret.generate()


class Channel(ShardChannel):
    """A pair without memory."""

    def __init__(self, hello: Hello, line: LifeLine) -> None:
        self.router_id, self.line = hello.router_id, line

    def poll(self) -> int:
        return -1

    def reply(self, nbytes: int) -> None:
        """Nobody asks."""

    def close(self) -> None:
        self.closed = True
        self.line.close()


class Port:
    """A listener in this process, and who is in."""

    def __init__(self, timeout_s: float = LONG_S, **limits: int) -> None:
        self.channels: list[Channel] = []
        self.opening, self.may_open = threading.Semaphore(0), threading.Event()
        self.may_open.set()
        self.controls: list[Control] = []  # as they end with the last reference
        self.listener = ControlListener(
            "127.0.0.1", self._open, self.channels.append, self.channels.remove, timeout_s, self._read,  # type: ignore[arg-type]
            secret=lambda: SECRET, limits=PortLimits(**limits),
        )  # fmt: skip
        self.endpoint = ShardEndpoint(3, "1", "127.0.0.1", self.listener.port, host_id(), os.getpid())

    def _open(self, hello: Hello, line: LifeLine) -> tuple[Channel, dict[str, Any]]:
        self.opening.release()
        assert self.may_open.wait(LONG_S)
        if hello.incarnation != "1":
            raise OtherIncarnationError("another one")
        if hello.transport == "broken":
            raise KeyError("a fault of the shard")
        return Channel(hello, line), {"for": hello.router_id}

    def _read(self, message: dict[str, Any], connection: socket.socket, line: LifeLine) -> Any:
        def serve() -> None:
            while data := connection.recv(100):
                connection.sendall(data.upper())

        return serve, {"said": message}

    def control(self, secret: MeshSecret | None = SECRET, **role: int) -> Control:
        return open_control(self.endpoint, secret, deadline_in(LONG_S), **role)

    def join(self, router_id: str = "r", transport: str = "shm") -> Control:
        control = self.control()
        self.controls.append(control)
        assert shake_hands(control, 3, hello_for(transport, router_id), deadline_in(LONG_S))["for"] == router_id
        return control

    def ids(self) -> list[str]:
        return sorted(channel.router_id for channel in self.channels)


@pytest.fixture
def port() -> Iterator[Port]:
    with_limits = Port(pairs=5, pairs_per_router=2, handshakes=4)
    yield with_limits
    with_limits.listener.stop()


def threads_and_descriptors() -> tuple[int, int]:
    return len(list(Path("/proc/self/task").iterdir())), len(list(Path("/proc/self/fd").iterdir()))


def test_a_member_gets_in_and_its_end_is_noticed(port: Port) -> None:
    control = port.join("a")
    assert port.ids() == ["a"]
    control.socket.close()
    await_true(lambda: not port.channels, "the pair's end")


def test_a_pair_that_the_shard_gives_up_is_forgotten_and_its_router_told(port: Port) -> None:
    control = port.join("a")
    port.channels[0].close()
    assert control.socket.recv(1) == b""
    await_true(lambda: not port.channels, "the pair's end")


def test_the_connection_is_the_routers_and_the_channels_after_the_answer(port: Port) -> None:
    """A transport may carry its rows on it: the listener reads nothing more and still notices the end."""
    control = port.join("a")
    channel = port.channels[0]
    channel.line.socket.setblocking(True)
    control.socket.sendall(b"rows")
    assert channel.line.socket.recv(4) == b"rows"
    channel.line.socket.sendall(b"sums")
    assert control.socket.recv(4) == b"sums"
    control.socket.sendall(b"unread")
    assert channel.line.gone() is None
    control.socket.close()
    await_true(lambda: not port.channels, "the pair's end")
    assert channel.line.gone() is not None


def test_a_duplicate_that_a_transport_keeps_costs_the_listener_nothing(port: Port) -> None:
    control = port.join("a")
    duplicate = port.channels[0].line.duplicate()
    try:
        assert port.channels[0].line.descriptor >= 0
        port.channels[0].close()
        await_true(lambda: not port.channels, "the pair's end")
        port.join("b")
        assert all_from(control.socket) == b""
        assert port.listener._epoll.poll(0) == [], "it is no longer watched"
    finally:
        os.close(duplicate)


def test_another_secret_is_refused_on_both_sides_with_what_to_do(
    port: Port, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ShardRejectedError, match=f"holds another secret of the mesh.*{SECRET_ENV}") as caught:
        port.control(OTHER_SECRET)
    # The shard tells its log after it has told the stranger.
    await_true(lambda: "does not know the mesh's secret; is it of another mesh" in caplog.text, "the line in the log")
    monkeypatch.setenv(SECRET_ENV, OTHER_SECRET.reveal())
    with pytest.raises(ShardRejectedError, match="holds another secret"):
        port.control(None)
    monkeypatch.delenv(SECRET_ENV)
    with pytest.raises(ShardRejectedError, match=f"{SECRET_ENV} holds no secret of the mesh; make one with"):
        port.control(None)
    for secret in (SECRET, OTHER_SECRET):
        assert secret.reveal() not in caplog.text + str(caught.value)
    assert port.ids() == []


def test_something_else_that_listens_there_is_not_taken_for_the_shard() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=lambda: server.accept()[0].sendall(b"HTTP/1.1 400 Bad Request" * 10))
        thread.start()
        endpoint = ShardEndpoint(3, "1", "127.0.0.1", server.getsockname()[1], host_id(), 0)
        with pytest.raises(ShardLostError, match="shard 3: handshake failed: it does not speak expertmesh's protocol"):
            open_control(endpoint, SECRET, deadline_in(LONG_S))
        thread.join(LONG_S)


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\nHost: there.example.org:1234\r\n\r\n", bytes(44), b"\xff" * 5000])
def test_a_stranger_learns_nothing(port: Port, said: bytes) -> None:
    with stranger_at(port.endpoint) as connection:
        connection.sendall(said)
        assert all_from(connection) == b""
    assert port.join().socket.fileno() >= 0


def test_who_knows_no_secret_gets_a_random_number_and_a_no(port: Port) -> None:
    with stranger_at(port.endpoint) as connection:
        connection.sendall(GREETING + secrets.token_bytes(32))
        answer = all_from(connection)
    assert len(answer) == 44 + 33
    assert answer[44:] == bytes(33)


def test_silent_strangers_cost_no_thread_and_make_room_for_others(port: Port) -> None:
    port.join("before")
    threads, descriptors = threads_and_descriptors()
    silent = [stranger_at(port.endpoint) for _ in range(200)]
    for connection in silent[::2]:
        connection.sendall(GREETING[:20])
    port.join("after")
    now_threads, now_descriptors = threads_and_descriptors()
    assert now_threads <= threads
    # Of this process are both ends: the strangers' own, a few that the port keeps, and the pair's two.
    assert now_descriptors <= descriptors + len(silent) + 4 + 2
    for connection in silent:
        connection.close()
    await_true(lambda: threads_and_descriptors()[1] <= descriptors + 2, "the descriptors' return")


def test_half_a_greeting_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "PROVE_TIMEOUT_S", 0.1)
    port = Port()
    with stranger_at(port.endpoint) as connection:
        connection.sendall(GREETING[:-1])
        assert all_from(connection) == b""
    control = port.control()  # a member has more time, and an end of it too
    control.socket.sendall(control.handshake.seal({})[:-1])
    port.join("others")
    port.listener.stop()
    short = Port(timeout_s=0.1)
    control = short.control()
    assert control.socket.recv(1) == b""
    short.listener.stop()


def test_pairs_have_limits_which_departures_restore(port: Port) -> None:
    first, _ = port.join("a"), port.join("a")
    with pytest.raises(
        ShardRejectedError, match=r"router a has 2 pairs with this shard already \(max_pairs_per_router"
    ):
        port.join("a")
    for router in "bcd":
        port.join(router)
    with pytest.raises(ShardRejectedError, match=r"this shard has 5 pairs already \(max_pairs\)"):
        port.join("e")
    first.socket.close()
    await_true(lambda: len(port.channels) == 4, "the departure")
    port.join("e")


def test_a_refusal_gives_its_place_back(port: Port) -> None:
    for _ in range(6):
        with pytest.raises(ShardRejectedError, match="a fault of the shard"):
            port.join("a", "broken")
    port.join("a")


def test_members_whose_pairs_take_long_are_not_pushed_out(port: Port) -> None:
    port.may_open.clear()
    joined: list[Control] = []
    threads = [threading.Thread(target=lambda name=name: joined.append(port.join(name))) for name in "abcd"]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert port.opening.acquire(timeout=LONG_S)
    with stranger_at(port.endpoint) as connection:  # there is no stranger to make room for it
        assert all_from(connection) == b""
    port.may_open.set()
    for thread in threads:
        thread.join(LONG_S)
    assert len(joined) == len(threads)
    port.join("e")


def test_a_router_that_leaves_while_its_pair_opens_leaves_no_pair(port: Port) -> None:
    port.may_open.clear()
    control = port.control()
    control.socket.sendall(control.handshake.seal(vars(hello_for("shm", "gone"))))
    assert port.opening.acquire(timeout=LONG_S)
    control.socket.close()
    port.may_open.set()
    for name in ("a", "b", "c", "d", "e"):  # all five places are free
        port.join(name)
    await_true(lambda: port.ids() == list("abcde"), "the pair's end")


def test_a_reader_is_served_by_a_thread_of_its_own_that_ends_with_it(port: Port) -> None:
    control = port.control(role=READER)
    assert shake_hands(control, 3, hello_for("shm", "reader"), deadline_in(LONG_S))["said"]["router_id"] == "reader"
    control.socket.sendall(b"abc")
    assert control.socket.recv(3) == b"ABC"
    assert any(thread.name == "shard-weights" for thread in threading.enumerate())
    control.socket.close()
    await_true(lambda: all(t.name != "shard-weights" for t in threading.enumerate()), "the thread's end")
    assert port.ids() == []


def test_another_incarnation_is_no_refusal(port: Port) -> None:
    control = port.control()
    hello = hello_for("shm")
    object.__setattr__(hello, "incarnation", "2")
    with pytest.raises(ShardLostError, match="another one"):
        shake_hands(control, 3, hello, deadline_in(LONG_S))


def test_stopping_drops_everybody(port: Port) -> None:
    pair, half = port.join(), stranger_at(port.endpoint)
    reader = port.control(role=READER)
    shake_hands(reader, 3, hello_for("shm"), deadline_in(LONG_S))
    port.listener.stop()
    port.listener.stop()
    assert port.channels == []
    for connection in (pair.socket, half, reader.socket):
        connection.settimeout(LONG_S)
        assert all_from(connection) == b""
    with pytest.raises(ShardLostError, match="cannot connect"):
        port.control()
