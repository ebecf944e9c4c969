"""Slots are read as they were written, through the page cache and past it, and memory decides which of the two."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from experts.kernels.offload import slot_reader
from experts.kernels.offload.slot_reader import AT_A_TIME, BLOCK, SlotReader
from tests.support.offloading import offloaded

STRIDE, SLOTS = 3 * BLOCK, 5
SIZE = STRIDE * SLOTS


@pytest.fixture
def file() -> Iterator[tuple[int, np.ndarray]]:
    """(descriptor, its mapping), filled with random bytes that are on no disk yet."""
    with tempfile.TemporaryFile() as opened:
        os.posix_fallocate(opened.fileno(), 0, SIZE)
        mapped = np.frombuffer(mmap.mmap(opened.fileno(), SIZE), np.uint8)
        mapped[:] = np.random.default_rng(0).integers(0, 256, SIZE)
        yield opened.fileno(), mapped


def aligned(nbytes: int) -> np.ndarray:
    """Memory that begins where a page does."""
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)


TARGETS = {
    "whole blocks": lambda: [aligned(STRIDE)],
    "one block": lambda: [aligned(BLOCK)],
    "no whole block": lambda: [aligned(STRIDE)[:5000]],
    "beside a block": lambda: [aligned(STRIDE + BLOCK)[7 : STRIDE + 7]],
    "several": lambda: [np.zeros(nbytes, np.uint8) for nbytes in (1, 4096, 3000)],
}


@pytest.mark.parametrize("room", [0, SIZE - 1, SIZE])
@pytest.mark.parametrize("made", TARGETS)
def test_each_way_reads_what_was_written_last(file: tuple[int, np.ndarray], room: int, made: str) -> None:
    descriptor, mapped = file
    reader = SlotReader(descriptor, STRIDE, SIZE, lambda: room)
    assert reader.past_cache == (room < SIZE), "this disk reads past the cache"
    for turn in range(2):
        for slot in (0, SLOTS - 1):
            start, targets = slot * STRIDE, TARGETS[made]()
            reader.read_each([start], [targets])
            got = np.concatenate(targets)
            assert np.array_equal(got, mapped[start : start + len(got)])
            mapped[start : start + STRIDE] += 1 + turn  # as migration writes a slot anew
    reader.close()


def test_memory_is_looked_at_again(file: tuple[int, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_reader, "LOOK_S", 0.0)
    rooms = iter([SIZE, 0, 0, SIZE])
    reader = SlotReader(file[0], STRIDE, SIZE, lambda: next(rooms))
    assert [reader.past_cache for _ in range(4)] == [False, True, True, False]
    reader.close()


def test_what_was_seen_of_the_memory_holds_for_a_while(file: tuple[int, np.ndarray]) -> None:
    looks: list[int] = []
    reader = SlotReader(file[0], STRIDE, SIZE, lambda: looks.append(0) or 0)
    assert all(reader.past_cache for _ in range(1000))
    assert len(looks) < 1000
    reader.close()


def test_threads_do_not_share_what_they_read_beside(file: tuple[int, np.ndarray]) -> None:
    descriptor, mapped = file
    reader = SlotReader(descriptor, STRIDE, SIZE, lambda: 0)
    wrong: list[int] = []

    def read(slot: int) -> None:
        for _ in range(200):
            target = np.zeros(5000, np.uint8)
            reader.read(slot * STRIDE, [target])
            if not np.array_equal(target, mapped[slot * STRIDE :][:5000]):
                wrong.append(slot)

    threads = [threading.Thread(target=read, args=(slot,), daemon=True) for slot in range(SLOTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert wrong == []
    reader.close()


def test_a_disk_has_several_to_read_at_a_time(file: tuple[int, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    descriptor, mapped = file
    reader, preadv = SlotReader(descriptor, STRIDE, SIZE, lambda: 0), os.preadv
    together = threading.Barrier(AT_A_TIME, timeout=60)

    def meet(*arguments: Any) -> int:
        together.wait()
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", meet)
    targets = [[aligned(STRIDE)] for _ in range(AT_A_TIME)]
    starts = [number % SLOTS * STRIDE for number in range(AT_A_TIME)]
    reader.read_each(starts, targets)
    for start, [target] in zip(starts, targets, strict=True):
        assert np.array_equal(target, mapped[start : start + STRIDE])
    reader.read_each([], [])
    reader.close()


def test_nothing_is_still_being_read_after_an_error(
    file: tuple[int, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a place that is given away would be written to."""
    reader, preadv = SlotReader(file[0], STRIDE, SIZE, lambda: 0), os.preadv
    failed, ended = threading.Event(), list[int]()

    def fail_first(given: int, into: Any, start: int) -> int:
        if start == failing:
            failed.set()
            raise OSError(errno.EIO, "broken")
        assert failed.wait(60)
        count = preadv(given, into, start)
        ended.append(start)
        return count

    monkeypatch.setattr(os, "preadv", fail_first)
    for failing in (0, 2 * STRIDE):
        failed.clear()
        ended.clear()
        with pytest.raises(OSError, match="broken"):
            reader.read_each([0, STRIDE, 2 * STRIDE], [[aligned(STRIDE)] for _ in range(3)])
        assert sorted(ended) == [start for start in (0, STRIDE, 2 * STRIDE) if start != failing]
    reader.close()


def test_one_that_waits_gets_on_while_others_keep_the_helpers_busy(
    file: tuple[int, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptor, mapped = file
    reader, preadv = SlotReader(descriptor, STRIDE, SIZE, lambda: 0), os.preadv
    go_on, waiting = threading.Event(), threading.Barrier(AT_A_TIME + 1, timeout=60)

    def hold(given: int, into: Any, start: int) -> int:
        if start == 0:
            waiting.wait()
            assert go_on.wait(60)
        return preadv(given, into, start)

    monkeypatch.setattr(os, "preadv", hold)
    busy = threading.Thread(target=reader.read_each, args=([0] * AT_A_TIME, [[aligned(STRIDE)]] * AT_A_TIME))
    busy.start()
    waiting.wait()
    target = aligned(STRIDE)
    reader.read_each([STRIDE], [[target]])
    assert np.array_equal(target, mapped[STRIDE : 2 * STRIDE])
    go_on.set()
    busy.join(60)
    reader.close()


def test_a_disk_with_larger_blocks_is_read_through_the_cache(
    file: tuple[int, np.ndarray], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No such disk is at hand; the system call is in its place."""
    descriptor, mapped = file
    reader, preadv = SlotReader(descriptor, STRIDE, SIZE, lambda: 0), os.preadv

    def refuse(given: int, *arguments: Any) -> int:
        if given != descriptor:
            raise OSError(errno.EINVAL, "Invalid argument")
        return preadv(given, *arguments)

    monkeypatch.setattr(os, "preadv", refuse)
    for _ in range(2):
        target = aligned(STRIDE)
        reader.read(STRIDE, [target])
        assert np.array_equal(target, mapped[STRIDE : 2 * STRIDE])
    assert not reader.past_cache
    assert caplog.text.count("this disk wants more than 4096 bytes") == 1
    reader.close()


@pytest.mark.parametrize("room", [0, SIZE])
def test_a_file_that_was_cut_is_an_error(file: tuple[int, np.ndarray], room: int) -> None:
    reader = SlotReader(file[0], STRIDE, SIZE, lambda: room)
    os.ftruncate(file[0], STRIDE)
    with pytest.raises(OSError, match=f"ends before byte {STRIDE}"):
        reader.read(STRIDE, [aligned(STRIDE)])
    reader.close()


def test_a_file_system_without_a_way_past_its_cache(
    file: tuple[int, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "open", refuse)
    reader = SlotReader(file[0], STRIDE, SIZE, lambda: 0)
    target = np.zeros(STRIDE, np.uint8)
    reader.read(0, [target])
    assert not reader.past_cache
    assert np.array_equal(target, file[1][:STRIDE])


@pytest.mark.parametrize(
    ("room", "bytes_per_s", "expected"), [(0, None, AT_A_TIME // 2), (0, 1e9, 1), (1 << 40, None, 1)]
)
def test_several_come_early_in_one_go_where_that_takes_no_longer(
    room: int, bytes_per_s: float | None, expected: int
) -> None:
    kernel = offloaded("torch_loop", 2, bytes_per_s=bytes_per_s)
    kernel._backing._reader._room = lambda: room  # type: ignore[attr-defined]
    assert kernel.together == expected
    kernel.close()
