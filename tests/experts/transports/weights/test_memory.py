"""Another process's memory, read as it stands there: bytes, faults, and the proof that it is the right process."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.transports.weights import memory
from experts.transports.weights.checksum import new_sums
from experts.transports.weights.memory import (
    CHUNK_BYTES,
    LentSlot,
    MemoryLender,
    MemoryOffer,
    PeerMemory,
    pid_namespace,
    sums_of,
)

NBYTES = 3 * CHUNK_BYTES + 5
OTHER = f"""
import ctypes, os, sys
data = b"N" * 32 + (7).to_bytes(8, "little") + os.urandom({NBYTES})
kept = ctypes.create_string_buffer(data, len(data))
print(ctypes.addressof(kept), flush=True)
sys.stdout.buffer.write(data)
sys.stdout.flush()
if sys.stdin.readline():
    kept[32] = 8
    print("changed", flush=True)
sys.stdin.readline()
"""


class Other:
    """A process with a nonce, a counter that is 7, and random bytes, one after the other."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        nonce = int(self.process.stdout.readline())
        self.bytes = np.frombuffer(self.process.stdout.read(40 + NBYTES), np.uint8)[40:]
        self.counter, self.address = nonce + 32, nonce + 40
        self.memory = PeerMemory(self.process.pid, MemoryOffer(nonce, (b"N" * 32).hex()))

    def count_on(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == b"changed\n"

    def lent(self, *sizes: int) -> LentSlot:
        starts = np.cumsum([0, *sizes])[:-1]
        places = [(self.address + int(at), size) for at, size in zip(starts, sizes, strict=True)]
        return LentSlot(self.memory, places, self.counter, 7)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def other() -> Iterator[Other]:
    """Stays as it is."""
    started = Other()
    yield started
    started.end()


@pytest.fixture
def victim() -> Iterator[Other]:
    started = Other()
    yield started
    started.end()


@settings(max_examples=30)
@given(
    sizes=st.lists(st.sampled_from([1, 7, 4096, CHUNK_BYTES, CHUNK_BYTES + 1]), max_size=3),
    step=st.sampled_from([4096, CHUNK_BYTES, 2 * CHUNK_BYTES]),
)
def test_views_come_piece_by_piece_as_they_are_with_the_sum_of_their_source(
    other: Other, sizes: list[int], step: int
) -> None:
    lent, sums, at = other.lent(*sizes), new_sums(), 0
    for size in sizes:
        got = np.zeros(size, np.uint8)
        for start in range(0, size, step):
            lent.read(got[start : start + step], sums)
        np.testing.assert_array_equal(got, other.bytes[at : at + size])
        at += size
    views = np.split(other.bytes[:at].copy(), np.cumsum(sizes)[:-1]) if sizes else []
    assert sums_of(views) == (int(sums[0]), int(sums[1]))
    assert lent.unchanged()


def test_a_counter_that_went_on_and_a_process_that_died_are_told(victim: Other) -> None:
    lent, piece = victim.lent(4096), np.zeros(4096, np.uint8)
    lent.read(piece, new_sums())
    victim.count_on()
    assert not lent.unchanged()
    victim.end()
    assert not victim.memory.proven()
    for act in (lent.unchanged, lambda: victim.lent(4096).read(piece, new_sums())):
        with pytest.raises(ProcessLookupError, match="No such process"):
            act()


def test_a_process_that_got_the_same_number_later_is_not_believed(other: Other) -> None:
    """It can be read, but another number stands where the nonce should."""
    offer = MemoryOffer(other.address, (b"N" * 32).hex())
    stranger = PeerMemory(other.process.pid, offer)
    assert not stranger.proven()
    lent = LentSlot(stranger, [(other.address, 4096)], other.counter, 7)
    lent.read(np.zeros(4096, np.uint8), new_sums())
    with pytest.raises(ConnectionError, match="gone"):
        lent.unchanged()


def test_memory_that_is_not_there_or_ends_is_an_error(victim: Other) -> None:
    target = np.zeros(CHUNK_BYTES, np.uint8)
    with pytest.raises(OSError, match="cannot be read") as caught:
        victim.memory.read(4096, target, new_sums())
    assert caught.value.errno == errno.EFAULT
    maps = [line.split() for line in Path(f"/proc/{victim.process.pid}/maps").read_text().splitlines()]
    ends = [int(row[0].partition("-")[2], 16) for row in maps if "r" in row[1]]
    starts = {int(row[0].partition("-")[0], 16) for row in maps}
    end = next(end for end in ends if end not in starts)
    with pytest.raises(OSError, match="cannot be read") as caught:
        victim.memory.read(end - 4096, target, new_sums())
    assert caught.value.errno == errno.EFAULT


def test_only_processes_of_the_same_pid_namespace_get_an_offer() -> None:
    lender = MemoryLender()
    assert lender.offer(os.getpid(), pid_namespace() + 1, lambda: False) is None
    offer = lender.offer(os.getpid(), pid_namespace(), lambda: False)
    assert offer is not None
    assert PeerMemory(os.getpid(), offer).proven()
    assert not PeerMemory(os.getpid(), replace(offer, nonce="0" * 64)).proven()
    assert not PeerMemory(1 << 22, offer).proven(), "there is no such process"


@pytest.mark.parametrize("change", [{"address": 0}, {"address": "1"}, {"nonce": "00"}, {"nonce": None}])
def test_impossible_offers_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="memory offer"):
        MemoryOffer(**(asdict(MemoryOffer(8, "0" * 64)) | change))  # type: ignore[arg-type]


def test_where_yama_asks_for_it_one_reader_at_a_time_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[int] = []
    monkeypatch.setattr(memory, "_only_named_readers", lambda: True)
    monkeypatch.setattr(memory, "_set_ptracer", lambda pid: named.append(pid) is None and pid != 13)
    lender, gone = MemoryLender(), set[int]()

    def offered(pid: int) -> bool:
        return lender.offer(pid, pid_namespace(), lambda: pid in gone) is not None

    assert offered(os.getpid())
    assert named == [], "a process may always read itself"
    assert not offered(13), "there is no such process"
    assert offered(11)
    assert not offered(12)
    assert offered(11)
    assert named == [13, 11, 11]
    lender.tidy_up()
    assert named == [13, 11, 11], "reader 11 is there still"
    gone.add(11)
    assert offered(12)
    gone.add(12)
    lender.tidy_up()
    lender.tidy_up()
    assert named == [13, 11, 11, 12, 0]
