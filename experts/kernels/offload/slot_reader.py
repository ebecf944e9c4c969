"""Reads packed experts out of their file: through the page cache where all of the file may be in it, else past it.

Where memory is short, the page cache has to drop an expert for each that it takes, which costs more than reading does;
and it keeps what was read last, which are the wrong ones of layers that are computed one after the other.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np

from experts.transports.memory_limit import page_cache_room

logger = logging.getLogger(__name__)

BLOCK = 4096
"""Of a slot in the file: a page is of one slot alone, and a disk reads it past the page cache (512 for most)."""
LOOK_S = 1.0
"""How long what was seen of the memory holds."""
AT_A_TIME = 8
"""Reads past the page cache: with one at a time a disk waits for whoever asks. Through the cache, Linux reads ahead."""


class SlotReader:
    """For any thread."""

    def __init__(self, file: int, stride: int, size: int, room: Callable[[], int] = page_cache_room) -> None:
        """`file` is a descriptor, `stride` the bytes from slot to slot, a multiple of BLOCK; `size` those of all."""
        self._file, self._stride, self._size, self._room = file, stride, size, room
        self._direct: int | None = None
        try:
            self._direct = os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:  # a file system that always caches
            logger.info("experts are read through the page cache alone: %s", error.strerror)
        self._can_pass = self._direct is not None
        self._short, self._looked_s = False, -LOOK_S
        self._own = threading.local()
        self._helpers = ThreadPoolExecutor(AT_A_TIME - 1, thread_name_prefix="shard-read")  # starts none before its use

    @property
    def past_cache(self) -> bool:
        """Whether memory is too short for the page cache to have all of the file."""
        now_s = time.monotonic()
        if self._can_pass and now_s - self._looked_s >= LOOK_S:
            self._looked_s, was = now_s, self._short
            self._short = self._room() < self._size
            if self._short != was:
                told = "too short for all of it: they are read past" if self._short else "enough: they are read through"
                logger.info("%.2f GB of experts are in a file; memory is %s the page cache", self._size / 1e9, told)
        return self._short

    def read_each(self, starts: Sequence[int], targets: Sequence[Sequence[np.ndarray]]) -> None:
        """`read` for each slot. None is still being read when it returns or raises."""
        if not self.past_cache:
            for start in starts:
                os.posix_fadvise(self._file, start, self._stride, os.POSIX_FADV_WILLNEED)
            for start, into in zip(starts, targets, strict=True):
                self.read(start, into)
            return
        # The caller reads, too: so it gets on while others keep the helpers busy.
        rest = [self._helpers.submit(self.read, *each) for each in list(zip(starts, targets, strict=True))[1:]]
        try:
            if starts:
                self.read(starts[0], targets[0])
        finally:
            wait(rest)
        for read in rest:
            read.result()

    def read(self, start: int, targets: Sequence[np.ndarray]) -> None:
        """Fill uint8 arrays, one after the other, from the slot at `start`. OSError if the file cannot be read."""
        if self._direct is not None and self.past_cache:
            try:
                self._read_past_cache(self._direct, start, targets)
                return
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                logger.warning("experts are read through the page cache: this disk wants more than %d bytes", BLOCK)
                self._can_pass = self._short = False
        for target in targets:
            _fill(self._file, target, start)
            start += target.nbytes

    def _read_past_cache(self, file: int, start: int, targets: Sequence[np.ndarray]) -> None:
        """A disk writes whole blocks to where blocks begin: into the only target if it is such, else beside."""
        first = targets[0]
        if len(targets) == 1 and first.ctypes.data % BLOCK == 0 and first.nbytes % BLOCK == 0:
            _fill(file, first, start)
            return
        beside: np.ndarray | None = getattr(self._own, "beside", None)
        if beside is None:
            beside = self._own.beside = np.frombuffer(mmap.mmap(-1, self._stride), np.uint8)
        _fill(file, beside, start)
        at = 0
        for target in targets:
            target[:] = beside[at : at + target.nbytes]
            at += target.nbytes

    def close(self) -> None:
        """Nothing is read afterwards."""
        self._helpers.shutdown()
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None


def _fill(file: int, target: np.ndarray, start: int) -> None:
    memory = memoryview(target.data)
    while memory:
        count = os.preadv(file, [memory], start)
        if count <= 0:
            raise OSError(f"the file of experts ends before byte {start}")
        memory, start = memory[count:], start + count
