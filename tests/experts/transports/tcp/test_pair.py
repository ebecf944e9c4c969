"""Both forms of a TCP pair against each other, and each against what no peer of ours would send."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.native.structs import LOST, NOT_YET
from experts.transports.tcp import bell as bell_module
from experts.transports.tcp import pair as pair_module
from experts.transports.tcp.bell import SOCKET_NEWS, NativeSocketBell, PythonSocketBell, SocketBell
from experts.transports.tcp.pair import NativeTcpPair, PythonTcpPair, TcpPair, frame_check
from tests.support.waiting import AWAIT_S, await_true, join

KEY = 0x1234_5678_9ABC_DEF0
CAPACITY = 1 << 16
HUGE = 24 << 20  # more than sockets hold
FORMS: dict[str, tuple[Any, Any]] = {
    "native": (NativeTcpPair, NativeSocketBell),
    "python": (PythonTcpPair, PythonSocketBell),
}


@dataclass
class Bell:
    """A shard's bell over words of its own."""

    kind: Any

    def __post_init__(self) -> None:
        self.words = np.zeros(32, np.uint32)
        address = int(self.words.ctypes.data)
        self.sockets: SocketBell = self.kind(address, address + 64)
        self.seen = 0

    def wait(self, timeout_s: float = AWAIT_S, spin_us: float = 0) -> bool:
        """Whether it was rung, or a socket has news."""
        value = self.sockets.wait(self.seen, int(spin_us * 1000), int(timeout_s * 1e9))
        rung, self.seen = value != self.seen, value % SOCKET_NEWS
        return rung


@contextlib.contextmanager
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    for end in (near, far):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with near, far:
        yield near, far


def router_end(form: str, connection: socket.socket, capacity: int = CAPACITY, key: int = KEY) -> TcpPair:
    return FORMS[form][0](os.dup(connection.fileno()), key, capacity, capacity, 20.0)


def shard_end(form: str, connection: socket.socket, bell: Bell, capacity: int = CAPACITY) -> TcpPair:
    return FORMS[form][0](os.dup(connection.fileno()), KEY, capacity, capacity, bell=bell.sockets)


def await_message(bell: Bell, pair: TcpPair) -> int:
    """What `receive` says once it is not NOT_YET."""
    deadline_s = time.monotonic() + AWAIT_S
    while (nbytes := pair.receive()) == NOT_YET:
        assert time.monotonic() < deadline_s
        bell.wait(1.0)
    return nbytes


def state_of(thread: threading.Thread) -> str:
    """Linux's letter for what the thread does: S for sleeping."""
    return Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(")")[2].split()[0]


def frame(body: bytes, number: int = 0, **wrong: int) -> bytes:
    """A frame as the peer would send it, but for what is `wrong`."""
    nbytes = wrong.get("nbytes", len(body))
    check = wrong.get("check", frame_check(wrong.get("key", KEY), nbytes, number))
    return nbytes.to_bytes(8, "little") + number.to_bytes(4, "little") + check.to_bytes(4, "little") + bytes(48) + body


@pytest.mark.parametrize("shard_form", FORMS)
@pytest.mark.parametrize("router_form", FORMS)
def test_messages_of_many_sizes_cross_both_ways(router_form: str, shard_form: str) -> None:
    rng = np.random.default_rng(1)
    bell = Bell(FORMS[shard_form][1])
    with connected() as (near, far):
        router, shard = router_end(router_form, near), shard_end(shard_form, far, bell)
        for size in [0, 1, 15, 16, 17, CAPACITY, *rng.integers(0, CAPACITY, 100).tolist()]:
            body = rng.integers(0, 256, size, np.uint8)
            router.send_buffer[:size] = body
            assert router.send(size) == 0
            assert await_message(bell, shard) == size
            assert shard.receive() == size, "a message stays until it is answered"
            assert np.array_equal(shard.recv_buffer[:size], body)
            answer = rng.integers(0, 256, CAPACITY - size, np.uint8)
            shard.send_buffer[: len(answer)] = answer
            assert shard.send(len(answer)) == 0
            assert router.wait(time.monotonic_ns() + int(AWAIT_S * 1e9)) == len(answer)
            assert np.array_equal(router.recv_buffer[: len(answer)], answer)


@pytest.mark.parametrize("form", FORMS)
def test_a_message_larger_than_all_buffers_waits_for_no_reader(form: str) -> None:
    """Both directions: neither send blocks, and all bytes come once the other end reads."""
    bell = Bell(FORMS[form][1])
    with connected() as (near, far):
        router, shard = router_end(form, near, HUGE), shard_end(form, far, bell, HUGE)
        body = np.random.default_rng(2).integers(0, 256, HUGE, np.uint8)
        router.send_buffer[:] = body
        for _ in range(2):
            assert router.send(HUGE) == 0
            if form == "python":  # sends the rest when asked for the answer
                until_ns = time.monotonic_ns() + int(AWAIT_S * 1e9)
                waiter = threading.Thread(target=router.wait, args=(until_ns,), daemon=True)
                waiter.start()
            assert await_message(bell, shard) == HUGE
            assert np.array_equal(shard.recv_buffer, body)
            shard.send_buffer[:] = shard.recv_buffer
            assert shard.send(HUGE) == 0
            assert shard.receive() == NOT_YET, "the reply is on its way, there is no new request"
            if form == "python":
                while waiter.is_alive():
                    bell.wait(0.05)
                    assert shard.receive() == NOT_YET
                join(waiter, "the reply")
            else:
                assert router.wait(time.monotonic_ns() + int(AWAIT_S * 1e9)) == HUGE
            assert np.array_equal(router.recv_buffer, body)


@pytest.mark.parametrize("form", FORMS)
def test_bytes_that_trickle_in_are_one_message(form: str) -> None:
    bell = Bell(FORMS[form][1])
    data = frame(bytes(range(40)))
    with connected() as (near, far):
        shard = shard_end(form, far, bell)
        for position in range(len(data) - 1):
            near.sendall(data[position : position + 1])
            assert shard.receive() == NOT_YET
        near.sendall(data[-1:])
        assert await_message(bell, shard) == 40
        assert bytes(shard.recv_buffer[:40]) == bytes(range(40))


WRONG = {
    "HTTP": (b"GET / HTTP/1.1\r\nHost: x\r\nUser-Agent: a stranger with a long name\r\n\r\n", "no frame"),
    "zeros": (bytes(100), "no frame"),
    "another pair's key": (frame(b"abc", key=KEY ^ 1), "no frame"),
    "a frame of another number": (frame(b"abc", number=1), "no frame"),
    "a wrong check": (frame(b"abc", check=0), "no frame"),
    "too long": (frame(b"", nbytes=CAPACITY + 1), "longer message than agreed"),
    "far too long": (frame(b"", nbytes=(1 << 64) - 1), "longer message than agreed"),
    "bytes behind the message": (frame(b"abc") + b"d", "no frame"),
    "two requests at once": (frame(b"abc") + frame(b"abc", number=1), "no frame"),
    "half a head, then the end": (frame(b"abc")[:7], "closed"),
    "half a message, then the end": (frame(b"abc")[:-1], "closed"),
    "nothing, then the end": (b"", "closed"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_frame_ends_the_pair(form: str, case: str) -> None:
    data, reason = WRONG[case]
    bell = Bell(FORMS[form][1])
    with connected() as (near, far):
        shard = shard_end(form, far, bell)
        near.sendall(data)
        if reason == "closed":
            near.close()
        assert await_message(bell, shard) == LOST
        assert reason in shard.why()
        assert shard.receive() == shard.send(0) == LOST


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sent", [0, 8, 100])
def test_a_reset_in_the_middle_of_a_message_ends_the_pair(form: str, sent: int) -> None:
    with connected() as (near, far):
        router = router_end(form, near)
        assert router.send(1000) == 0
        far.sendall(frame(bytes(1000))[:sent])
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        far.close()
        # So far away that only the loss can end the wait.
        assert router.wait(time.monotonic_ns() + 3600 * 10**9) == LOST
        assert "closed the connection" in router.why()


@pytest.mark.parametrize("form", FORMS)
def test_a_wait_ends_at_its_deadline_and_when_the_pair_is_ended(form: str) -> None:
    with connected() as (near, _):
        router = router_end(form, near)
        assert router.send(10) == 0
        deadline_ns = time.monotonic_ns() + 20_000_000
        assert router.wait(deadline_ns) == NOT_YET
        assert time.monotonic_ns() >= deadline_ns
        outcome: list[int] = []
        for_long_ns = time.monotonic_ns() + 3600 * 10**9
        waiter = threading.Thread(target=lambda: outcome.append(router.wait(for_long_ns)), daemon=True)
        waiter.start()
        router.end()
        near.shutdown(socket.SHUT_RDWR)
        join(waiter, "the end of the wait")
        assert outcome == [LOST]


@settings(max_examples=200)
@given(data=st.binary(max_size=200), form=st.sampled_from(sorted(FORMS)))
def test_no_bytes_of_a_stranger_are_taken_for_a_message(data: bytes, form: str) -> None:
    bell = Bell(FORMS[form][1])
    with connected() as (near, far):
        shard = shard_end(form, far, bell)
        near.sendall(data)
        near.shutdown(socket.SHUT_WR)
        assert await_message(bell, shard) == LOST


@settings(max_examples=100)
@given(number=st.integers(0, 2**32 - 1), nbytes=st.integers(0, 2**64 - 1), key=st.integers(0, 2**64 - 1))
def test_the_check_word_depends_on_everything(number: int, nbytes: int, key: int) -> None:
    check = frame_check(key, nbytes, number)
    assert 0 <= check < 2**32
    others = [(key ^ 1 << 40, nbytes, number), (key, nbytes ^ 1, number), (key, nbytes, number ^ 1)]
    assert any(frame_check(*other) != check for other in others)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ringers", [0, 1])
def test_a_bell_hears_rings_and_sockets_while_it_sleeps(form: str, ringers: int) -> None:
    bell = Bell(FORMS[form][1])
    bell.sockets.set_ringers(ringers)
    assert not bell.wait(0.01)
    heard: list[bool] = []

    def hears(cause: Callable[[], object]) -> None:
        """It wakes by `cause`, whether that comes before it sleeps or after."""
        for let_it_sleep in (False, False, True, True):
            while bell.wait(0.01):  # what is left of before
                continue
            waiter = threading.Thread(target=lambda: heard.append(bell.wait(3600)), daemon=True)
            waiter.start()
            if let_it_sleep:
                await_true(lambda thread=waiter: state_of(thread) == "S", "the waiting thread to sleep")
            cause()
            join(waiter, "the bell")
            assert heard.pop()

    hears(bell.sockets.ring)
    with connected() as (near, far):
        shard = shard_end(form, far, bell)
        hears(lambda: near.send(b"x"))
        shard.end()
        while bell.wait(0.01):
            continue
        near.send(b"y")
        assert not bell.wait(0.05), "an ended pair is not heard"
    hears(bell.sockets.ring)


@pytest.mark.parametrize("form", FORMS)
def test_pairs_come_and_go_while_the_bell_is_waited_for(form: str) -> None:
    """Sockets are closed and their numbers used again under the waiting thread: nobody gets another's message."""
    bell = Bell(FORMS[form][1])
    pairs: list[TcpPair] = []
    done = threading.Event()
    failures: list[str] = []

    def serve() -> None:
        while not done.is_set():
            bell.wait(0.02, spin_us=10)
            for pair in list(pairs):
                nbytes = pair.receive()
                if nbytes >= 0:
                    pair.send_buffer[:nbytes] = pair.recv_buffer[:nbytes]
                    pair.send(nbytes)

    def talk(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(25):
            with connected() as (near, far):
                shard = shard_end(form, far, bell, 4096)
                pairs.append(shard)
                router = router_end(form, near, 4096)
                for _ in range(chance.randrange(4)):
                    body = chance.randbytes(chance.randrange(2000))
                    router.send_buffer[: len(body)] = np.frombuffer(body, np.uint8)
                    router.send(len(body))
                    nbytes = router.wait(time.monotonic_ns() + int(AWAIT_S * 1e9))
                    if nbytes != len(body) or bytes(router.recv_buffer[:nbytes]) != body:
                        failures.append(f"{nbytes} bytes came back of {len(body)}: {router.why()}")
                if chance.random() < 0.5:
                    router.send(chance.randrange(2000))  # and leaves before the answer
                pairs.remove(shard)
                shard.end()

    threads = [threading.Thread(target=talk, args=(seed,), daemon=True) for seed in range(4)]
    server = threading.Thread(target=serve, daemon=True)
    for thread in (server, *threads):
        thread.start()
    for thread in threads:
        join(thread, "a router")
    done.set()
    join(server, "the shard")
    assert failures == []


def test_without_a_compiler_pairs_are_pythons(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (bell_module, pair_module):
        monkeypatch.setattr(module, "data_plane", lambda: None)
    words = np.zeros(32, np.uint32)
    bell = bell_module.socket_bell(int(words.ctypes.data), int(words.ctypes.data) + 64)
    assert isinstance(bell, PythonSocketBell)
    with connected() as (near, far):
        made = pair_module.tcp_pair(os.dup(near.fileno()), KEY, 64, 64, bell=bell)
        assert isinstance(made, PythonTcpPair)
        assert isinstance(pair_module.tcp_pair(os.dup(far.fileno()), KEY, 64, 64), PythonTcpPair)
        made.end()
