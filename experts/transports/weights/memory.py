"""Reading experts straight out of another process of this host, with process_vm_readv(2): one copy, and no hand-over.

The source says where the slot stands, with its checksum, and how often it had been released; the reader fetches the
bytes into its own slot and sums them up while they are in the cache. The reader can write nothing. Linux lets it read
what it could also trace: processes of the same user (root may read all), in one PID namespace, unless something forbids
that. So the source proves with a random number in its memory that it can be read, and `ring` is there if it cannot.
"""

from __future__ import annotations

import ctypes
import functools
import os
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numba import carray, types

from experts.transports.weights.checksum import add_to_sums, new_sums
from placement.compiled import compiled

CHUNK_BYTES = 1 << 20  # summed up in the cache; smaller chunks cost more system calls: 256 KiB are a seventh slower
_NONCE_BYTES = 32
_PARTIAL = 14  # EFAULT: the rest of it is not mapped there
_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
_PR_SET_PTRACER = 0x59616D61

_readv = types.ExternalFunction(
    "process_vm_readv", types.int64(types.int32, types.int64, types.uint64, types.int64, types.uint64, types.uint64)
)
_errno = types.ExternalFunction("__errno_location", types.CPointer(types.int32)())


@compiled()
def _read(pid: int, source: int, target: int, nbytes: int, sums: np.ndarray, vectors: np.ndarray) -> int:
    """Copy `nbytes` at `source` of process `pid` to `target` and add them to `sums`. 0, or an errno.

    `vectors`, int64 [4], is scratch memory: struct iovec of the target, then of the source.
    """
    done = 0
    at = vectors.ctypes.data
    while done < nbytes:
        size = min(nbytes - done, CHUNK_BYTES)
        vectors[0], vectors[1], vectors[2], vectors[3] = target + done, size, source + done, size
        got = _readv(types.int32(pid), at, types.uint64(1), at + 16, types.uint64(1), types.uint64(0))
        if got < 0:
            return carray(_errno(), 1)[0]
        if got != size:
            return types.int64(_PARTIAL)
        add_to_sums(target + done, size, sums)
        done += size
    return types.int64(0)


def pid_namespace() -> int:
    """What tells the PID namespace of this process from others of the host."""
    return os.stat("/proc/self/ns/pid").st_ino


@dataclass(frozen=True)
class MemoryOffer:
    """What a source says of its memory when a reader connects: where a random number stands in it."""

    address: int
    nonce: str

    def __post_init__(self) -> None:
        """TypeError or ValueError for impossible values."""
        if type(self.address) is not int or not 0 < self.address < 1 << 63:
            raise ValueError(f"memory offer: address is {self.address!r}, expected one")
        if not isinstance(self.nonce, str) or len(self.nonce) != 2 * _NONCE_BYTES:
            raise ValueError(f"memory offer: nonce is {self.nonce!r}, expected {2 * _NONCE_BYTES} hex digits")


class MemoryLender:
    """The source's side: its random number, and who may read."""

    def __init__(self) -> None:
        self._nonce = np.frombuffer(bytearray(secrets.token_bytes(_NONCE_BYTES)), np.uint8)
        self._lock = threading.Lock()
        self._named = 0
        self._named_left: Callable[[], bool] = lambda: True

    def offer(self, pid: int, namespace: int, left: Callable[[], bool]) -> MemoryOffer | None:
        """Let the process `pid` read until it has `left`; None if it certainly cannot. Call `tidy_up` then."""
        if namespace != pid_namespace():
            return None
        with self._lock:
            if pid != os.getpid() and _only_named_readers() and not self._name(pid, left):
                return None
        return MemoryOffer(int(self._nonce.ctypes.data), self._nonce.tobytes().hex())

    def tidy_up(self) -> None:
        """A reader left."""
        with self._lock:
            if self._named and self._named_left():
                self._named = 0
                _set_ptracer(0)

    def _name(self, pid: int, left: Callable[[], bool]) -> bool:
        """Have Yama (ptrace_scope 1) let `pid` read.

        Without this it lets nobody but ancestors. It grants that process and its descendants all of ptrace(2), so they
        may also stop this process and write to it; so may each process of this user where Yama does not run. Only one
        process can be named at a time, so further readers use the ring.
        """
        if self._named not in (0, pid) and not self._named_left():
            return False
        if not _set_ptracer(pid):
            return False
        self._named, self._named_left = pid, left
        return True


def _only_named_readers() -> bool:
    try:
        return _YAMA.read_text().strip() == "1"
    except OSError:
        return False


def _set_ptracer(pid: int) -> bool:
    return int(ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(pid), 0, 0, 0)) == 0


class PeerMemory:
    """The reader's side: the memory of the process `pid`. One thread uses it at a time."""

    def __init__(self, pid: int, offer: MemoryOffer) -> None:
        self._pid = pid
        self._offer = offer
        self._vectors = np.zeros(4, np.int64)

    def proven(self) -> bool:
        """Whether the process can be read, and is the one that made the offer: a PID may have been given anew."""
        nonce = np.zeros(_NONCE_BYTES, np.uint8)
        try:
            self.read(self._offer.address, nonce, new_sums())
        except OSError:
            return False
        return nonce.tobytes().hex() == self._offer.nonce

    def read(self, address: int, target: np.ndarray, sums: np.ndarray) -> None:
        """Fill `target` (uint8, contiguous) from `address` on and add it to `sums`, without the GIL. OSError.

        What came is worth nothing unless the process is `proven` afterwards.
        """
        error = int(_read(self._pid, address, int(target.ctypes.data), len(target), sums, self._vectors))
        if error:
            raise OSError(error, f"the memory of process {self._pid} cannot be read: {os.strerror(error)}")


class LentSlot:
    """An expert in the memory of another process, read from its beginning to its end."""

    def __init__(self, memory: PeerMemory, places: list[tuple[int, int]], counter: int, releases: int) -> None:
        """`places`: (address, bytes) of the slot's views. `counter`: address of the int64 that was `releases`."""
        self._memory = memory
        self._places = iter(places)
        self._at = self._left = 0
        self._counter = counter
        self._releases = releases

    def read(self, piece: np.ndarray, sums: np.ndarray) -> None:
        """Fill `piece` with what follows; no piece passes the end of a view. OSError."""
        if not self._left:
            self._at, self._left = next(self._places)
        self._memory.read(self._at, piece, sums)
        self._at += len(piece)
        self._left -= len(piece)

    def unchanged(self) -> bool:
        """Whether all that was read is of the slot as it was lent. ConnectionError if the process is another one."""
        counter = np.zeros(1, np.int64)
        self._memory.read(self._counter, counter.view(np.uint8), new_sums())
        if not self._memory.proven():
            raise ConnectionError("the process that had the expert is gone")
        return int(counter[0]) == self._releases


def sums_of(views: list[np.ndarray]) -> tuple[int, int]:
    """The sums of `views` (uint8, contiguous) one after the other, as who reads them finds. Without the GIL."""
    sums = new_sums()
    for view in views:
        add_to_sums(int(view.ctypes.data), len(view), sums)
    return int(sums[0]), int(sums[1])


@functools.cache
def warm_up() -> None:
    """Compile the machine code, or load it from the cache."""
    target = np.zeros(8, np.uint8)
    address = int(target.ctypes.data)
    _read(os.getpid(), address, address, 8, new_sums(), np.zeros(4, np.int64))
