"""Shared memory between a router and the shards of its host: messages are written once, where the other side reads them.

A shard's doorbell is a page of its own that every router of the host maps; each pair has a region of its own:

    words (uint32, one cache line each): REQUEST seq | REPLY seq | router sleeps | reply bytes | request bytes
    request buffer | reply buffer

A router counts REQUEST up and rings the shard's doorbell; the shard sets REPLY to the same number. Waits yield the core
for a moment, then sleep on a futex (`atomics`). Both files are unlinked as soon as both sides have mapped them, so that
nothing stays behind when a process is killed.
"""

from __future__ import annotations

import mmap
import os
import secrets
import time
from collections.abc import Callable

import numpy as np

from experts.errors import ShardLostError, ShardTimeoutError
from experts.link import Doorbell, RouterLink, ShardChannel
from experts.transports import atomics

_LINE = 64
_REQUEST, _REPLY, _ROUTER_SLEEPS, _REPLY_BYTES, _REQUEST_BYTES, _NOBODY = range(6)
_CONTROL_BYTES = 4096
_SLICE_NS = 20_000_000  # how often a sleeping router looks whether the shard's process is still there
_FOLDER = "/dev/shm"


class SharedRegion:
    """A mapped file in /dev/shm. `create` makes it, `attach` maps what another process made."""

    def __init__(self, path: str, size: int, create: bool) -> None:
        flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0)
        descriptor = os.open(path, flags, 0o600)
        try:
            if create:
                # Allocate now: a full /dev/shm is an error here instead of a SIGBUS in the middle of a request.
                os.posix_fallocate(descriptor, 0, size)
            elif os.fstat(descriptor).st_size < size:
                raise ValueError(f"{path} has {os.fstat(descriptor).st_size} bytes, expected {size}")
            self._map = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        self.path = path
        self.bytes = np.frombuffer(self._map, np.uint8)
        self.address = int(self.bytes.ctypes.data)

    @classmethod
    def create(cls, size: int, label: str) -> SharedRegion:
        """A fresh region of `size` bytes, zeroed. OSError (ENOSPC) when /dev/shm is full."""
        return cls(os.path.join(_FOLDER, f"expertmesh-{label}-{secrets.token_hex(8)}"), size, create=True)

    @classmethod
    def attach(cls, path: str, size: int) -> SharedRegion:
        """Map a region that another process created."""
        if os.path.dirname(os.path.normpath(path)) != _FOLDER:
            raise ValueError(f"{path!r} is not a file of {_FOLDER}")
        return cls(path, size, create=False)

    def unlink(self) -> None:
        """Remove the name; the memory lives until the last mapping goes."""
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            return


class ShmDoorbell(Doorbell):
    """A counter in a page of its own; routers of the host map it and ring it directly."""

    def __init__(self, spin_us: float, label: str = "bell") -> None:
        self.region = SharedRegion.create(_CONTROL_BYTES, label)
        self._seen = 0
        self._spin_ns = int(spin_us * 1000)

    def ring(self) -> None:
        atomics.ring(self.region.address, self.region.address + _LINE)

    def wait(self, timeout_s: float) -> bool:
        address = self.region.address
        before = self._seen
        self._seen = atomics.wait_while_equal(address, address + _LINE, before, self._spin_ns, int(timeout_s * 1e9))
        return self._seen != before

    def close(self) -> None:
        """Remove the page's name."""
        self.region.unlink()


class ShmRouterLink(RouterLink):
    """The router's end; it creates the pair's region and maps the shard's doorbell."""

    def __init__(
        self, rank: int, send_capacity: int, recv_capacity: int, spin_us: float, peer_gone: Callable[[], str | None]
    ) -> None:
        self.rank = rank
        self.region = SharedRegion.create(_CONTROL_BYTES + send_capacity + recv_capacity, f"pair{rank}")
        self.send_buffer = self.region.bytes[_CONTROL_BYTES : _CONTROL_BYTES + send_capacity]
        self.recv_buffer = self.region.bytes[_CONTROL_BYTES + send_capacity :]
        self._words = self.region.bytes[:_CONTROL_BYTES].view(np.uint32)[:: _LINE // 4]
        self._bell: SharedRegion | None = None
        self._seq = 0
        self._spin_ns = int(spin_us * 1000)
        self._peer_gone = peer_gone
        self._closed = False

    def attach_bell(self, path: str) -> None:
        """Map the shard's doorbell, whose name came back in the handshake."""
        self._bell = SharedRegion.attach(path, _CONTROL_BYTES)

    def post(self, nbytes: int) -> None:
        if self._closed or self._bell is None:
            raise ShardLostError(self.rank, "the link is closed")
        self._seq = (self._seq + 1) & 0xFFFFFFFF
        self._words[_REQUEST_BYTES] = nbytes
        base = self.region.address
        atomics.publish(base + _REQUEST * _LINE, self._seq, base + _NOBODY * _LINE)
        atomics.ring(self._bell.address, self._bell.address + _LINE)

    def wait(self, deadline_s: float) -> int:
        base = self.region.address
        reply, sleeps = base + _REPLY * _LINE, base + _ROUTER_SLEEPS * _LINE
        before = (self._seq - 1) & 0xFFFFFFFF
        deadline_ns = int(deadline_s * 1e9)
        spin_ns = self._spin_ns
        while True:
            left_ns = deadline_ns - time.monotonic_ns()
            seen = atomics.wait_while_equal(reply, sleeps, before, spin_ns, max(min(left_ns, _SLICE_NS), 0))
            if seen == self._seq:
                return int(self._words[_REPLY_BYTES])
            reason = self._peer_gone()
            if reason is not None:
                raise ShardLostError(self.rank, reason)
            if left_ns <= 0:
                raise ShardTimeoutError(self.rank, "no reply in shared memory before the dispatch deadline")
            spin_ns = 0

    def close(self) -> None:
        self._closed = True
        self.region.unlink()


class ShmShardChannel(ShardChannel):
    """The shard's end; it maps the region that the router made."""

    def __init__(self, router_id: str, path: str, request_capacity: int, reply_capacity: int) -> None:
        self.router_id = router_id
        self.region = SharedRegion.attach(path, _CONTROL_BYTES + request_capacity + reply_capacity)
        self.recv_buffer = self.region.bytes[_CONTROL_BYTES : _CONTROL_BYTES + request_capacity]
        self.send_buffer = self.region.bytes[_CONTROL_BYTES + request_capacity :]
        self._words = self.region.bytes[:_CONTROL_BYTES].view(np.uint32)[:: _LINE // 4]
        self._answered = 0

    def poll(self) -> int:
        if self.closed:
            return -1
        if int(atomics.load_word(self.region.address + _REQUEST * _LINE)) == self._answered:
            return -1
        return int(self._words[_REQUEST_BYTES])

    def reply(self, nbytes: int) -> None:
        base = self.region.address
        self._words[_REPLY_BYTES] = nbytes
        self._answered = int(atomics.load_word(base + _REQUEST * _LINE))
        atomics.publish(base + _REPLY * _LINE, self._answered, base + _ROUTER_SLEEPS * _LINE)

    def close(self) -> None:
        self.closed = True
