"""A stream of bytes from one process to another of the same host, through a small ring of shared memory.

    words (uint32, one cache line each): chunks WRITTEN | chunks READ | reader sleeps | writer sleeps
    NUM_CHUNKS chunks of CHUNK_BYTES

The ring fits a processor's cache, so each byte crosses main memory twice, as in one memcpy: once out of the writer's
slot, once into the reader's. Both loops run without the GIL, and sum up what stands in the slots on the way. Both sides
cut what they send alike: every piece but the last of a slot's view is a multiple of CHUNK_BYTES.
"""

from __future__ import annotations

import functools

import numpy as np
from numba import types

from experts.transports import atomics
from experts.transports.shared_region import SharedRegion
from experts.transports.weights.checksum import add_to_sums, new_sums
from placement.compiled import compiled

CHUNK_BYTES = 128 << 10
NUM_CHUNKS = 8
_LINE = 64
_WRITTEN, _READ, _READER_SLEEPS, _WRITER_SLEEPS = range(4)
_CONTROL_BYTES = 4096
RING_BYTES = _CONTROL_BYTES + NUM_CHUNKS * CHUNK_BYTES

_memcpy = types.ExternalFunction("memcpy", types.int64(types.int64, types.int64, types.int64))


@compiled()
def _tell(word: int, count: int, sleeping: int, wake: bool) -> None:
    """Set a count; the other side's sleep is ended only now and then, as that costs as much as copying a chunk."""
    if wake:
        atomics.publish(word, count, sleeping)
    else:
        atomics.store_release(word, types.uint32(count))


@compiled()
def _write(base: int, written: int, source: int, nbytes: int, sums: np.ndarray, timeout_ns: int) -> int:
    """Put bytes into the ring after the first `written` chunks; returns how many, fewer if no space came in time."""
    done = 0
    while done < nbytes:
        full = (written - NUM_CHUNKS) & 0xFFFFFFFF
        read = atomics.wait_while_equal(base + _READ * _LINE, base + _WRITER_SLEEPS * _LINE, full, 0, timeout_ns)
        if read == full:
            break
        size = min(nbytes - done, CHUNK_BYTES)
        add_to_sums(source + done, size, sums)
        _memcpy(base + _CONTROL_BYTES + (written % NUM_CHUNKS) * CHUNK_BYTES, source + done, size)
        written = (written + 1) & 0xFFFFFFFF
        done += size
        _tell(base + _WRITTEN * _LINE, written, base + _READER_SLEEPS * _LINE, done == nbytes or written % 4 == 0)
    return done


@compiled()
def _read(base: int, read: int, target: int, nbytes: int, sums: np.ndarray, timeout_ns: int) -> int:
    """Take bytes out of the ring after the first `read` chunks; returns how many, fewer if none came in time."""
    done = 0
    while done < nbytes:
        seen = atomics.wait_while_equal(base + _WRITTEN * _LINE, base + _READER_SLEEPS * _LINE, read, 0, timeout_ns)
        if seen == read:
            break
        size = min(nbytes - done, CHUNK_BYTES)
        _memcpy(target + done, base + _CONTROL_BYTES + (read % NUM_CHUNKS) * CHUNK_BYTES, size)
        add_to_sums(target + done, size, sums)
        read = (read + 1) & 0xFFFFFFFF
        done += size
        # The writer sleeps only while the ring is full, so the reader surely comes to its next half.
        _tell(base + _READ * _LINE, read, base + _WRITER_SLEEPS * _LINE, read % (NUM_CHUNKS // 2) == 0)
    return done


def _chunks(nbytes: int) -> int:
    return -(-nbytes // CHUNK_BYTES)


class RingEnd:
    """One end of a ring: either writes or reads, in the order of its calls."""

    def __init__(self, region: SharedRegion) -> None:
        self._region = region
        self._count = 0

    def write(self, piece: np.ndarray, sums: np.ndarray, timeout_s: float) -> int:
        """Send `piece` (uint8, contiguous) and add it to `sums`; returns the bytes sent before a wait timed out."""
        at = int(piece.ctypes.data)
        done = int(_write(self._region.address, self._count, at, len(piece), sums, int(timeout_s * 1e9)))
        self._count = (self._count + _chunks(done)) & 0xFFFFFFFF
        return done

    def read(self, piece: np.ndarray, sums: np.ndarray, timeout_s: float) -> int:
        """Fill `piece` (uint8, contiguous), then add to `sums` what stands there; likewise."""
        at = int(piece.ctypes.data)
        done = int(_read(self._region.address, self._count, at, len(piece), sums, int(timeout_s * 1e9)))
        self._count = (self._count + _chunks(done)) & 0xFFFFFFFF
        return done


@functools.cache
def warm_up() -> None:
    """Compile the machine code, or load it from the cache."""
    atomics.warm_up()
    memory = np.zeros(RING_BYTES, np.uint8)
    base = int(memory.ctypes.data)
    add_to_sums(base, 8, new_sums())
    _write(base, 0, base, 8, new_sums(), 0)
    _read(base, 0, base, 8, new_sums(), 0)
