"""What every transport must do for a pair of a router and a shard."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from experts.protocol.errors import ShardLostError, ShardTimeoutError
from experts.protocol.wire import HEADER_BYTES
from tests.support.echo_shard import (
    CAPACITY,
    DROP,
    HOLD,
    ROW_BYTES,
    EchoShard,
    counted_up,
    echo_shard,
    post_body,
    reply_body,
)
from tests.support.waiting import join

TRANSPORTS = ["shm", "tcp", "gloo_split", "shm_split"]
LONG_S = 30.0


def deadline(seconds: float = LONG_S) -> float:
    return time.monotonic() + seconds


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def lasting_shard() -> Iterator[EchoShard]:
    """For tests that leave the shard unchanged."""
    with echo_shard() as shard:
        yield shard


def settle(shard: EchoShard, num_channels: int = 0) -> None:
    """Wait until the shard has `num_channels` channels, and drop its events meanwhile."""
    deadline_s = deadline()
    while time.monotonic() < deadline_s:
        shard.pipe.send("channels")
        while (event := shard.event())[0] != "channels":
            continue
        if event[1] == num_channels:
            return
        time.sleep(0.005)
    raise AssertionError(f"the shard still has {event[1]} channels")


def test_bytes_come_back_over_a_hundred_messages_of_many_sizes(lasting_shard: EchoShard, transport: str) -> None:
    link = lasting_shard.connect(transport)
    assert link.transport == transport
    random = np.random.default_rng(0)
    sizes = [0, 1, 63, 64, 65, CAPACITY - HEADER_BYTES, *random.integers(0, CAPACITY - HEADER_BYTES, 94).tolist()]
    for size in sizes:
        body = random.integers(0, 256, size, np.uint8).tobytes()
        num_rows = size // ROW_BYTES
        nbytes = post_body(link, body, num_rows=num_rows)
        assert link.wait(deadline()) == nbytes
        assert reply_body(link, nbytes) == counted_up(body)
    link.close()


def test_a_message_of_no_bytes_is_a_message(lasting_shard: EchoShard) -> None:
    link = lasting_shard.connect("tcp")
    link.send_buffer[:] = 0
    link.post(HEADER_BYTES)
    assert link.wait(deadline()) == HEADER_BYTES
    link.close()


def test_a_message_over_the_capacity_is_refused_before_it_leaves(lasting_shard: EchoShard, transport: str) -> None:
    link = lasting_shard.connect(transport, capacity=4096)
    capacity = len(link.send_buffer)
    assert capacity >= 4096
    with pytest.raises(ValueError, match=f"{capacity + 1} bytes does not fit into {capacity}"):
        link.post(capacity + 1)
    nbytes = post_body(link, bytes(len(link.recv_buffer) - HEADER_BYTES))
    assert link.wait(deadline()) == nbytes
    link.close()


def test_killed_shard_ends_a_wait_long_before_its_deadline(transport: str) -> None:
    with echo_shard() as shard:
        link = shard.connect(transport)
        post_body(link, b"abc", HOLD)
        assert shard.event() == ("held", "router")
        os.kill(shard.endpoint.pid, signal.SIGKILL)
        # The deadline is so far away that only the loss can end the wait within the test's time-out.
        with pytest.raises(ShardLostError) as caught:
            link.wait(deadline(3600))
        assert caught.value.rank == 0
        assert caught.value.reason
        link.close()


def test_stopped_shard_costs_the_deadline_and_not_more_links(transport: str) -> None:
    with echo_shard() as shard:
        link = shard.connect(transport)
        shard.stop()
        post_body(link, b"abc")
        deadline_s = deadline(0.3)
        with pytest.raises(ShardTimeoutError, match="before the dispatch deadline"):
            link.wait(deadline_s)
        assert time.monotonic() >= deadline_s - 0.002
        link.close()
        with pytest.raises(ShardLostError):
            post_body(link, b"abc")
        shard.resume()
        # The shard resumes, finds the router gone, and serves the next one.
        settle(shard)
        again = shard.connect(transport)
        nbytes = post_body(again, b"abc")
        assert again.wait(deadline()) == nbytes
        again.close()


def test_late_reply_goes_nowhere(transport: str) -> None:
    with echo_shard() as shard:
        link = shard.connect(transport, "slow")
        post_body(link, b"old", HOLD)
        assert shard.event() == ("held", "slow")
        with pytest.raises(ShardTimeoutError):
            link.wait(deadline(0.05))
        link.close()
        assert shard.event() == ("left", "slow")
        again = shard.connect(transport, "again")
        shard.pipe.send("release")
        assert shard.event() == ("released", 1)
        nbytes = post_body(again, b"new")
        assert again.wait(deadline()) == nbytes
        assert reply_body(again, nbytes) == counted_up(b"new")
        again.close()


def test_a_pair_that_the_shard_gives_up_is_lost_at_once(transport: str) -> None:
    with echo_shard() as shard:
        link = shard.connect(transport)
        post_body(link, b"abc", DROP)
        with pytest.raises(ShardLostError):
            link.wait(deadline(3600))
        link.close()
        assert shard.event() == ("left", "router")


def test_a_shard_that_stops_lets_go_of_its_routers(transport: str) -> None:
    with echo_shard() as shard:
        link = shard.connect(transport)
        post_body(link, b"abc", HOLD)
        assert shard.event() == ("held", "router")
        shard.pipe.send("stop")
        with pytest.raises(ShardLostError):
            link.wait(deadline(3600))
        link.close()


def test_closing_is_idempotent_and_the_shard_notices(lasting_shard: EchoShard, transport: str) -> None:
    link = lasting_shard.connect(transport, "brief")
    link.close()
    link.close()
    while lasting_shard.event() != ("left", "brief"):
        continue
    with pytest.raises(ShardLostError):
        link.post(HEADER_BYTES)


def test_many_routers_at_once_each_get_their_own_answers(transport: str) -> None:
    def talk(number: int) -> None:
        link = shard.connect(transport, f"router{number}")
        for turn in range(30):
            body = bytes([number, turn]) * (1 + 50 * number)
            nbytes = post_body(link, body)
            assert link.wait(deadline()) == nbytes
            assert reply_body(link, nbytes) == counted_up(body)
        link.close()

    with echo_shard() as shard, ThreadPoolExecutor(6) as pool:
        list(pool.map(talk, range(12)))
        settle(shard)


def test_one_shard_serves_routers_of_all_transports_at_once() -> None:
    """Busy and idle by turns, so that its loop also sleeps with each of them as the one that wakes it."""

    def talk(number: int) -> None:
        link = shard.connect(TRANSPORTS[number % len(TRANSPORTS)], f"router{number}")
        for turn in range(60):
            body = bytes([number, turn]) * (1 + 300 * number)
            nbytes = post_body(link, body)
            assert link.wait(deadline()) == nbytes
            assert reply_body(link, nbytes) == counted_up(body)
            if turn % 20 == 0:
                meet.wait(LONG_S)  # those that are done wait for the others
        link.close()

    meet = threading.Barrier(6)
    with echo_shard() as shard, ThreadPoolExecutor(6) as pool:
        list(pool.map(talk, range(6)))
        for transport in (*TRANSPORTS, *reversed(TRANSPORTS)):  # one at a time, the others silent
            link = shard.connect(transport)
            nbytes = post_body(link, b"abc")
            assert link.wait(deadline()) == nbytes
            link.close()
        settle(shard)


def test_a_router_that_never_reads_does_not_hold_up_the_others(transport: str) -> None:
    with echo_shard() as shard:
        # Too large for the reply to fit into socket buffers.
        stalled = shard.connect(transport, "stalled", capacity=1 << 24)
        post_body(stalled, bytes((1 << 24) - HEADER_BYTES))
        other = shard.connect(transport, "other")
        for _ in range(10):
            nbytes = post_body(other, b"abc")
            assert other.wait(deadline()) == nbytes
        assert stalled.wait(deadline()) == 1 << 24
        stalled.close()
        other.close()


def test_one_lost_shard_of_two_leaves_the_other_link_alone(transport: str) -> None:
    with echo_shard(0) as first, echo_shard(1) as second:
        links = [first.connect(transport), second.connect(transport)]
        for link in links:
            post_body(link, b"abc", HOLD if link is links[0] else 0)
        assert first.event() == ("held", "router")
        first.process.kill()
        with pytest.raises(ShardLostError):
            links[0].wait(deadline(3600))
        assert links[1].wait(deadline()) == HEADER_BYTES + 3
        links[0].close()
        nbytes = post_body(links[1], b"def")
        assert links[1].wait(deadline()) == nbytes
        links[1].close()


def test_pairs_leave_no_threads_and_no_descriptors_behind(lasting_shard: EchoShard, transport: str) -> None:
    def open_and_close() -> None:
        link = lasting_shard.connect(transport)
        nbytes = post_body(link, b"abc")
        link.wait(deadline())
        assert reply_body(link, nbytes) == counted_up(b"abc")
        link.close()

    open_and_close()  # makes what exists once, such as gloo's device and the I/O thread
    settle(lasting_shard)
    gc.collect()
    before = resources(os.getpid()), resources(lasting_shard.endpoint.pid)
    for _ in range(5):
        open_and_close()
    settle(lasting_shard)
    deadline_s = deadline()
    while time.monotonic() < deadline_s:
        gc.collect()
        after = resources(os.getpid()), resources(lasting_shard.endpoint.pid)
        if all(a <= b for new, old in zip(after, before, strict=True) for a, b in zip(new, old, strict=True)):
            return
        time.sleep(0.01)
    raise AssertionError(f"(descriptors, threads) of router and shard were {before} and are {after}")


def resources(pid: int) -> tuple[int, int]:
    """Open descriptors and threads of a process."""
    return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))


def test_waits_run_without_the_interpreter_lock(transport: str) -> None:
    with echo_shard() as shard:
        link = shard.connect(transport)
        post_body(link, b"abc", HOLD)
        assert shard.event() == ("held", "router")
        outcome: list[int] = []
        waiter = threading.Thread(target=lambda: outcome.append(link.wait(deadline())), daemon=True)
        waiter.start()
        shard.pipe.send("release")  # only possible while the wait lets other threads run
        assert shard.event() == ("released", 1)
        join(waiter, "the reply")
        assert outcome == [HEADER_BYTES + 3]
        link.close()
