"""The memory of pairs within a host: only what messages need, given back when they need it no more."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator

import numpy as np
import pytest

from experts.transports.base import RouterLink
from experts.transports.shared_region import SharedRegion
from experts.transports.shm import ShmRouterLink
from tests.support.echo_shard import HOLD, EchoShard, counted_up, deadline_in, echo_shard, post_body, reply_body
from tests.support.waiting import wait_for

LONG_S = 30.0
PAGE = mmap.PAGESIZE
CAPACITY = 1 << 24


@pytest.fixture(scope="module")
def shard() -> Iterator[EchoShard]:
    with echo_shard() as shard:
        yield shard


def taken(region: SharedRegion) -> int:
    """Bytes of a region that have memory, whoever touched them."""
    pages = -(-len(region.bytes) // PAGE)
    there = np.zeros(pages, np.uint8)
    found = ctypes.CDLL(None, use_errno=True).mincore(
        ctypes.c_void_p(region.address), ctypes.c_size_t(len(region.bytes)), ctypes.c_void_p(there.ctypes.data)
    )
    assert found == 0, ctypes.get_errno()
    return int((there & 1).sum()) * PAGE


def connected(shard: EchoShard) -> ShmRouterLink:
    link = shard.connect("shm", capacity=CAPACITY)
    assert isinstance(link, ShmRouterLink)
    return link


def echo(link: RouterLink, size: int) -> None:
    """A message of `size` bytes there and back, checked."""
    body = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
    nbytes = post_body(link, body)
    assert link.wait(deadline_in(LONG_S)) == nbytes
    assert reply_body(link, nbytes) == counted_up(body)


def test_a_pair_takes_what_its_messages_need(shard: EchoShard) -> None:
    link = connected(shard)
    assert len(link.region.bytes) > 2 * CAPACITY
    wait_for(lambda: taken(link.region) == PAGE, 10, "the shard's look at the words alone")
    echo(link, 10_000)
    assert taken(link.region) <= 9 * PAGE
    echo(link, CAPACITY - 128)
    assert taken(link.region) > 1.9 * CAPACITY
    link.close()


def test_what_the_last_message_did_not_need_is_given_back_and_an_idle_pair_gives_all(shard: EchoShard) -> None:
    link = connected(shard)
    echo(link, CAPACITY - 128)
    echo(link, 100_000)
    link.trim()
    assert taken(link.region) <= 4 * 100_000 + 8 * PAGE
    echo(link, 100_000)
    before = taken(link.region)
    link.trim()
    assert taken(link.region) == before, "messages of this size cost no page again and again"
    link.trim()
    assert taken(link.region) <= 3 * PAGE, "the words, and a part of a page at the end of each buffer"
    echo(link, CAPACITY - 128)
    link.close()


def test_a_reply_that_may_still_come_is_not_lost(shard: EchoShard) -> None:
    link = connected(shard)
    echo(link, 200_000)
    nbytes = post_body(link, b"abc" * 50_000, HOLD)
    while shard.event() != ("held", "router"):  # earlier pairs leave
        continue
    for _ in range(3):
        link.trim()
    shard.pipe.send("release")
    assert link.wait(deadline_in(LONG_S)) == nbytes
    assert reply_body(link, nbytes) == counted_up(b"abc" * 50_000)
    link.close()
    link.trim()


def allocated(region: SharedRegion) -> int:
    """Bytes of a region that have memory, touched or not. Needs the descriptor, unlike `taken`."""
    return os.fstat(region.descriptor).st_blocks * 512


def test_only_whole_pages_are_given_back() -> None:
    region = SharedRegion.create(8 * PAGE, "test", reserved=PAGE)
    assert allocated(region) == PAGE
    region.bytes[:] = 7
    region.give_back(PAGE + 1, 4 * PAGE - 1)
    assert allocated(region) == 7 * PAGE, "of pages 1 to 3 only the one in the middle is whole"
    region.give_back(5 * PAGE + 1, 6 * PAGE)
    region.give_back(3 * PAGE, 2 * PAGE)
    assert set(np.flatnonzero(region.bytes == 0) // PAGE) == {2}
    assert allocated(SharedRegion.create(8 * PAGE, "test")) == 8 * PAGE
