"""Memory that two processes of a host share, and the handover of its descriptor from one to the other.

The memory has no name anywhere: the shard makes it with memfd_create(2) and sends the router a file descriptor over a
socket. So a killed process leaves nothing behind, and the size of /dev/shm (64 MiB in a container, shared with Ray's
object store) does not matter.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import secrets
import socket
import struct
import time

import numpy as np

logger = logging.getLogger(__name__)

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SharedRegion:
    """Mapped anonymous memory that another process of the host can also map."""

    def __init__(self, descriptor: int, size: int) -> None:
        """Map the `size` bytes of `descriptor` and take ownership of it. ValueError for another size."""
        self.descriptor = descriptor
        try:
            actual = os.fstat(descriptor).st_size
            if actual != size:
                raise ValueError(f"shared memory has {actual} bytes, expected {size}")
            self._map = mmap.mmap(descriptor, size)
        except BaseException:
            os.close(descriptor)
            raise
        self.bytes = np.frombuffer(self._map, np.uint8)
        self.address = int(self.bytes.ctypes.data)

    @classmethod
    def create(cls, size: int, label: str, reserved: int | None = None) -> SharedRegion:
        """A new region of `size` zero bytes. OSError if there is not enough memory.

        The first `reserved` bytes (None: all) are allocated now, the others page by page as they are first touched.
        """
        descriptor = os.memfd_create(f"expertmesh-{label}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # Seal the size: no SIGBUS in the middle of a request, whatever the peer does.
            os.ftruncate(descriptor, size)
            os.posix_fallocate(descriptor, 0, size if reserved is None else reserved)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor, size)

    def give_back(self, start: int, stop: int) -> None:
        """Free the whole pages from byte `start` to `stop`, on both sides; they read as zeros until written again."""
        first, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        if first < end:
            self._map.madvise(mmap.MADV_REMOVE, first, end - first)

    def drop_descriptor(self) -> None:
        """Close the descriptor; the memory stays until the last mapping is gone. Idempotent."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class FdMailbox:
    """The router's mailbox for the shard's descriptors: a Unix socket in the abstract namespace, so without a file."""

    def __init__(self) -> None:
        self.name = f"expertmesh-{secrets.token_hex(16)}"
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind("\0" + self.name)
        self._server.listen(1)

    def receive(self, deadline_s: float, count: int = 2) -> list[int]:
        """The `count` descriptors from `send`, before `deadline_s` (time.monotonic()).

        Other users' are turned away. TimeoutError, ConnectionError for another number of them.
        """
        while True:
            self._server.settimeout(max(deadline_s - time.monotonic(), 0.001))
            connection, _ = self._server.accept()
            with connection:
                try:
                    _check_user(connection)
                except PermissionError as error:  # it must not keep the shard out
                    logger.warning("%s", error)
                    continue
                connection.settimeout(max(deadline_s - time.monotonic(), 0.001))
                _, descriptors, _, _ = socket.recv_fds(connection, 1, count)
            break
        if len(descriptors) != count:
            for descriptor in descriptors:
                os.close(descriptor)
            raise ConnectionError(f"received {len(descriptors)} descriptors of shared memory, expected {count}")
        return descriptors

    @staticmethod
    def send(name: str, descriptors: list[int], timeout_s: float) -> None:
        """The shard's side: put `descriptors` into the mailbox `name`. ValueError if it cannot be reached."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            try:
                connection.connect("\0" + name)
                _check_user(connection)
                socket.send_fds(connection, [b"m"], descriptors)
            except OSError as error:
                raise ValueError(f"shared memory cannot be handed over, is this another host? {error}") from error

    def close(self) -> None:
        """Stop listening. Idempotent."""
        self._server.close()


def _check_user(connection: socket.socket) -> None:
    """PermissionError unless the other end of a Unix socket is of this user, or root's."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    user = struct.unpack("3i", credentials)[1]
    if user not in (os.getuid(), 0):
        raise PermissionError(f"user {user} would share memory, expected user {os.getuid()} or root")
