"""A shard in a process of its own, which tells its status; also one whose experts are a mapped file."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from experts.kernels.native.kernel import NativeKernel
from experts.kernels.offload import FileBacking
from experts.protocol.settings import ShardSettings
from experts.shard import kernels as shard_kernels
from experts.shard import server as shard_server
from experts.shard.server import ShardServer
from placement.placement import Placement

_PAGE = mmap.PAGESIZE
_FIXED, _DONTNEED = 0x10, 4  # MAP_FIXED, MADV_DONTNEED of Linux


class MappedKernel(NativeKernel):
    """The native kernel over a mapped file, of which the page cache keeps `resident` slots of each layer.

    In place of a cgroup's limit: after each call the slots that were used longest ago are dropped from page tables and
    page cache, so that their next use reads the disk.
    """

    resident = 1

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._file = tempfile.TemporaryFile(prefix="expertmesh-mapped-")  # noqa: SIM115
        size, self._address = self._packed.nbytes, self._packed.ctypes.data
        os.posix_fallocate(self._file.fileno(), 0, size)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [ctypes.c_void_p, *[ctypes.c_size_t] * 5]
        self._libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        flags = mmap.MAP_SHARED | _FIXED
        found = self._libc.mmap(self._address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, self._file.fileno(), 0)
        if found != self._address:
            raise OSError(ctypes.get_errno(), "the file of experts cannot be mapped")
        self._recent: list[OrderedDict[int, None]] = []

    def compiled_forward(self) -> None:
        """Python notes what is used."""

    def forward(self, layer: int, *call: Any) -> None:
        """See `NativeKernel.forward`."""
        if not self._recent:
            self._begin()
        super().forward(layer, *call)
        recent = self._recent[layer]
        for slot in np.unique(call[2].numpy()).tolist():
            recent[slot] = None
            recent.move_to_end(slot)
        while len(recent) > self.resident:
            self._drop(layer, recent.popitem(last=False)[0])

    def _begin(self) -> None:
        os.fsync(self._file.fileno())  # only clean pages can be dropped
        self._recent = [OrderedDict() for _ in range(self.shape.num_layers)]
        for layer in range(self.shape.num_layers):
            for slot in range(self.shape.num_slots):
                self._drop(layer, slot)

    def _drop(self, layer: int, slot: int) -> None:
        start = (layer * self.shape.num_slots + slot) * self._slot_bytes
        first, last = -(-start // _PAGE) * _PAGE, (start + self._slot_bytes) // _PAGE * _PAGE
        self._libc.madvise(self._address + first, last - first, _DONTNEED)
        os.posix_fadvise(self._file.fileno(), first, last - first, os.POSIX_FADV_DONTNEED)


class ColdBacking(FileBacking):
    """A file whose pages are dropped as soon as they were read: all memory is the kernel's."""

    _clean = False

    def copy(self, layer: int, slot: int, targets: Sequence[torch.Tensor]) -> None:
        """See `Backing`."""
        if not self._clean:
            os.fsync(self._file.fileno())
            self._clean = True
        super().copy(layer, slot, targets)
        start, nbytes = (layer * self._num_slots + slot) * self._stride, self._stride
        os.posix_fadvise(self._file.fileno(), start, nbytes, os.POSIX_FADV_DONTNEED)


def serve(settings: dict[str, Any], placement: str, pipe: Connection, mapped: float | None, cold: bool) -> None:
    """A shard's process: its endpoint, then its status whenever it is asked for.

    `mapped`: no offloading, but a mapped file with this share of the slots in memory. `cold`: what is offloaded is read
    from the disk each time.
    """
    if cold:
        shard_kernels.FileBacking = ColdBacking  # type: ignore[misc]
    if mapped is not None:
        pick = shard_kernels.kernel_for

        def kernel_for(*given: Any) -> MappedKernel:
            shape = pick(*given).shape
            MappedKernel.resident = max(round(mapped * shape.num_slots), 1)
            return MappedKernel(shape)

        shard_server.kernel_for = kernel_for  # type: ignore[assignment]
    server = ShardServer(ShardSettings.model_validate(settings))
    pipe.send(server.start(Placement.from_json(placement), 0, 1))
    while pipe.recv():
        pipe.send(server.status())
    server.stop()
