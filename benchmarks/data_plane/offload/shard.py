"""A shard in a process of its own, which tells its status; also one whose experts are a mapped file."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from multiprocessing.connection import Connection
from typing import Any

from experts.kernels.native.kernel import NativeKernel
from experts.protocol.settings import ShardSettings
from experts.shard import server as shard_server
from experts.shard.server import ShardServer
from placement.placement import Placement

_FIXED = 0x10  # MAP_FIXED of Linux


class MappedKernel(NativeKernel):
    """The native kernel over a mapped file, of which Linux keeps as much in memory as there is room for."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._file = tempfile.TemporaryFile(prefix="expertmesh-mapped-")  # noqa: SIM115
        size, address = self._packed.nbytes, self._packed.ctypes.data
        os.posix_fallocate(self._file.fileno(), 0, size)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, *[ctypes.c_size_t] * 5]
        flags = mmap.MAP_SHARED | _FIXED
        found = libc.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, self._file.fileno(), 0)
        if found != address:
            raise OSError(ctypes.get_errno(), "the file of experts cannot be mapped")


def serve(settings: dict[str, Any], placement: str, pipe: Connection, mapped: bool) -> None:
    """A shard's process: told to begin, it sends its endpoint, then its status whenever it is asked for.

    `mapped`: no offloading, but experts in a mapped file.
    """
    if mapped:
        pick = shard_server.kernel_for
        shard_server.kernel_for = lambda *given: MappedKernel(pick(*given).shape)  # type: ignore[assignment]
    pipe.recv()
    server = ShardServer(ShardSettings.model_validate(settings))
    pipe.send(server.start(Placement.from_json(placement), 0, 1))
    os.sync()  # what is dirty cannot be dropped
    while pipe.recv():
        pipe.send(server.status())
    server.stop()
