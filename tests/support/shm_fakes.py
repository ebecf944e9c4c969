"""Fake links behind shared memory: a thread answers as the fakes do, so a dispatcher uses its compiled form on them."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from experts.protocol.errors import ShardLostError, ShardTimeoutError
from experts.transports.control import LifeLine
from experts.transports.shared_region import FdMailbox
from experts.transports.shm import ShmDoorbell, ShmRouterLink, ShmShardChannel
from tests.support.fake_links import FakeLink
from tests.support.waiting import join


@dataclass
class _Pair:
    link: ShmRouterLink
    channel: ShmShardChannel
    fake: FakeLink


def shm_pair(rank: int, bell: ShmDoorbell, request: int, reply: int) -> tuple[ShmRouterLink, ShmShardChannel]:
    """Both ends of a pair in this process; `request` and `reply` are bytes of the buffers."""
    ours, theirs = socket.socketpair()
    mailbox = FdMailbox()
    channel = ShmShardChannel(f"router-{rank}", mailbox.name, bell, request, reply, LifeLine(theirs))
    descriptors = mailbox.receive(time.monotonic() + 30)
    mailbox.close()
    link = ShmRouterLink.attach(rank, (descriptors[0], descriptors[1]), request, reply, 0.0, LifeLine(ours))
    return link, channel


def _pair(fake: FakeLink, bell: ShmDoorbell) -> _Pair:
    link, channel = shm_pair(fake.rank, bell, len(fake.send_buffer), len(fake.recv_buffer))
    return _Pair(link, channel, fake)


def _answer(pair: _Pair, nbytes: int) -> None:
    channel, fake = pair.channel, pair.fake
    fake.send_buffer[:nbytes] = channel.recv_buffer[:nbytes]
    fake.posted.append(nbytes)
    try:
        length = fake.wait(0)
    except ShardLostError:
        channel.close()
    except ShardTimeoutError:
        channel.closed = True  # it stays connected and says nothing more
    else:
        channel.send_buffer[:] = fake.recv_buffer
        channel.reply(length)


@contextlib.contextmanager
def behind_shared_memory(fakes: dict[int, FakeLink]) -> Iterator[dict[int, ShmRouterLink]]:
    """Links to the fakes, by rank, answered by a thread until the end of the block."""
    bell = ShmDoorbell(0)
    pairs = [_pair(fake, bell) for fake in fakes.values()]
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            bell.wait(1)
            for pair in pairs:
                nbytes = pair.channel.poll()
                if nbytes >= 0:
                    _answer(pair, nbytes)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield {pair.fake.rank: pair.link for pair in pairs}
    finally:
        stop.set()
        bell.ring()
        join(thread, "the fake shards to end")
        for pair in pairs:
            pair.link.close()
            pair.channel.close()
        bell.close()
