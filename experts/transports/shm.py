"""Shared memory between a router and the shards of its host: messages are written where the other side reads them.

A shard's doorbell is one page that every router of the host maps. Each pair has its own region:

    words (uint32, one cache line each): REQUEST seq | REPLY seq | router sleeps | reply bytes | request bytes
    request buffer | reply buffer

A router adds 1 to REQUEST and rings the shard's doorbell; the shard sets REPLY to the same number. Waits yield the core
for a moment, then sleep on a futex. `shared_region` makes the memory and hands it over. The buffers are as large as the
largest message, but take only the memory that messages needed since the router trimmed them.

Both ends are compiled (native/shm_link.h); the Numba functions here serve where there is no C++ compiler. The `native`
structs hold the state of the pair either way.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
import time

import numpy as np
from numba import types

from experts.native.library import data_plane
from experts.native.structs import KIND_SHM, LOST, NOT_YET, NativeChannel, NativeLink
from experts.protocol.errors import ShardLostError, ShardTimeoutError
from experts.transports import atomics
from experts.transports.base import Doorbell, RouterLink, ShardChannel
from experts.transports.control import LifeLine
from experts.transports.shared_region import FdMailbox, SharedRegion
from experts.transports.tcp.bell import SOCKET_NEWS, SocketBell, socket_bell
from placement.compiled import compiled

logger = logging.getLogger(__name__)

_LINE = 64
_REQUEST, _REPLY, _ROUTER_SLEEPS, _REPLY_BYTES, _REQUEST_BYTES = range(5)
_CONTROL_BYTES = 4096
_CHECK_INTERVAL_NS = (
    20_000_000  # how often a waiting router checks that the shard's process is still there; also in waiting.h
)
_MAILBOX_TIMEOUT_S = 5.0


@compiled()
def _post(base: int, bell: int, seq: int, nbytes: int) -> None:
    """Write the request's length and number, and ring."""
    atomics.store_release(base + _REQUEST_BYTES * _LINE, types.uint32(nbytes))
    atomics.store_release(base + _REQUEST * _LINE, types.uint32(seq))
    atomics.ring(bell, bell + _LINE)


@compiled()
def _await_reply(base: int, seq: int, spin_ns: int, timeout_ns: int) -> int:
    """Length of the reply to request `seq`, or -1 if it does not come within `timeout_ns`."""
    before = (seq - 1) & 0xFFFFFFFF
    seen = atomics.wait_while_equal(base + _REPLY * _LINE, base + _ROUTER_SLEEPS * _LINE, before, spin_ns, timeout_ns)
    return int(atomics.load_acquire(base + _REPLY_BYTES * _LINE)) if seen == seq else -1


@compiled()
def _poll(base: int, answered: int) -> tuple[int, int]:
    """Number and length of a request with no reply yet; the length is -1 for none. The router may write both words."""
    seq = int(atomics.load_acquire(base + _REQUEST * _LINE))
    if seq == answered:
        return seq, -1
    return seq, int(atomics.load_acquire(base + _REQUEST_BYTES * _LINE))


@compiled()
def _reply(base: int, seq: int, nbytes: int) -> None:
    """Write the reply's length and number, and wake the router if it sleeps."""
    atomics.store_release(base + _REPLY_BYTES * _LINE, types.uint32(nbytes))
    atomics.publish(base + _REPLY * _LINE, seq, base + _ROUTER_SLEEPS * _LINE)


@functools.cache
def warm_up() -> None:
    """Compile the machine code, or load it from the cache, so that no dispatch pays the second that it takes."""
    data_plane()
    atomics.warm_up()
    words = np.zeros(_CONTROL_BYTES // 4, np.uint32)
    base = int(words.ctypes.data)
    _post(base, base + 16 * _LINE, 1, 0)
    _poll(base, 0)
    _reply(base, 1, 0)
    _await_reply(base, 1, 0, 0)


class ShmDoorbell(Doorbell):
    """A counter in its own page; the host's routers map it and ring it directly."""

    def __init__(self, spin_us: float, label: str = "bell") -> None:
        warm_up()
        self.region = SharedRegion.create(_CONTROL_BYTES, label)
        self._seen = 0
        self.spin_ns = int(spin_us * 1000)
        self._lock = threading.Lock()
        self._sockets: SocketBell | None = None
        self._ringers = 0

    def hear_sockets(self) -> SocketBell:
        """What watches sockets from now on, as `wait` does: whoever adds one rings once. OSError if there is none."""
        with self._lock:
            if self._sockets is None:
                self._sockets = socket_bell(self.region.address, self.region.address + _LINE)
                self._sockets.set_ringers(self._ringers)
            return self._sockets

    @property
    def native_sockets(self) -> int | None:
        """Address of the compiled SocketBell; None before `hear_sockets`, or without one."""
        return getattr(self._sockets, "address", None)

    def add_ringers(self, count: int) -> None:
        """Count routers that ring from other processes, `count` of them more."""
        with self._lock:
            self._ringers += count
            if self._sockets is not None:
                self._sockets.set_ringers(self._ringers)

    def ring(self) -> None:
        if self._sockets is None:
            atomics.ring(self.region.address, self.region.address + _LINE)
        else:
            self._sockets.ring()

    def wait(self, timeout_s: float) -> bool:
        address, before, timeout_ns = self.region.address, self._seen, int(timeout_s * 1e9)
        if self._sockets is None:
            value = atomics.wait_while_equal(address, address + _LINE, before, self.spin_ns, timeout_ns)
        else:
            value = self._sockets.wait(before, self.spin_ns, timeout_ns)
        self._seen = value % SOCKET_NEWS
        return value != before

    def close(self) -> None:
        """Stop handing it to routers. Idempotent."""
        self.region.drop_descriptor()


class ShmRouterLink(RouterLink):
    """The router's end: it maps the shard's doorbell and the pair's region, both made by the shard."""

    native: NativeLink

    def __init__(
        self,
        rank: int,
        bell: SharedRegion,
        region: SharedRegion,
        send_capacity: int,
        spin_us: float,
        line: LifeLine,
    ) -> None:
        warm_up()
        self.rank = rank
        self.transport = "shm"
        self.region = region
        self.send_buffer = region.bytes[_CONTROL_BYTES : _CONTROL_BYTES + send_capacity]
        self.recv_buffer = region.bytes[_CONTROL_BYTES + send_capacity :]
        self.native = NativeLink.of(KIND_SHM, self.send_buffer, self.recv_buffer)
        self.native.words, self.native.bell = region.address, bell.address
        self.native.line, self.native.spin_ns = line.descriptor, int(spin_us * 1000)
        self._address = ctypes.addressof(self.native)
        self._library = data_plane()
        self._capacity = send_capacity
        self._bell = bell
        self._line = line
        self._trimmed_seq = -1

    @classmethod
    def attach(
        cls,
        rank: int,
        descriptors: tuple[int, int],
        send_capacity: int,
        recv_capacity: int,
        spin_us: float,
        line: LifeLine,
    ) -> ShmRouterLink:
        """Map the (doorbell, pair) `descriptors` that the shard sent. ValueError if their sizes are not as agreed."""
        try:
            bell = SharedRegion(descriptors[0], _CONTROL_BYTES)
        except BaseException:
            os.close(descriptors[1])
            raise
        region = SharedRegion(descriptors[1], _CONTROL_BYTES + send_capacity + recv_capacity)
        bell.drop_descriptor()
        region.drop_descriptor()
        return cls(rank, bell, region, send_capacity, spin_us, line)

    def post(self, nbytes: int) -> None:
        native = self.native
        if native.closed:
            raise ShardLostError(self.rank, "the link is closed")
        if nbytes > self._capacity:
            raise ValueError(f"a request of {nbytes} bytes does not fit into {self._capacity}")
        if self._library is not None:
            self._library.data_plane_post(self._address, nbytes)
        else:
            native.seq = (native.seq + 1) & 0xFFFFFFFF
            _post(self.region.address, self._bell.address, native.seq, nbytes)

    def wait(self, deadline_s: float) -> int:
        deadline_ns = int(deadline_s * 1e9)
        if self._library is not None:
            nbytes = int(self._library.data_plane_wait(self._address, deadline_ns))
        else:
            nbytes = self._wait(deadline_ns)
        if nbytes >= 0:
            return nbytes
        if self.native.closed:
            raise ShardLostError(self.rank, "the link is closed")
        if nbytes == LOST:
            raise ShardLostError(self.rank, self._line.gone() or "its connection broke")
        raise ShardTimeoutError(self.rank, "no reply in shared memory before the dispatch deadline")

    def _wait(self, deadline_ns: int) -> int:
        """Length of the reply, LOST, or NOT_YET at the deadline."""
        native, spin_ns = self.native, self.native.spin_ns
        while not native.closed:
            left_ns = deadline_ns - time.monotonic_ns()
            wait_ns = max(min(left_ns, _CHECK_INTERVAL_NS), 0)
            nbytes = _await_reply(self.region.address, native.seq, spin_ns, wait_ns)
            if nbytes >= 0:
                return nbytes
            if self._line.gone() is not None:
                return LOST
            if left_ns <= 0:
                return NOT_YET
            spin_ns = 0
        return LOST

    def trim(self) -> None:
        word = self.region.address
        seq = atomics.load_word(word + _REQUEST * _LINE)
        if self.native.closed or seq != atomics.load_word(word + _REPLY * _LINE):
            return  # a late reply may still be written
        idle, self._trimmed_seq = seq == self._trimmed_seq, seq
        ends = 0, len(self.send_buffer), len(self.send_buffer) + len(self.recv_buffer)
        for number, length in enumerate((_REQUEST_BYTES, _REPLY_BYTES)):
            used = 0 if idle else 2 * int(atomics.load_word(word + length * _LINE))  # the next one may be larger
            self.region.give_back(_CONTROL_BYTES + ends[number] + used, _CONTROL_BYTES + ends[number + 1])

    def close(self) -> None:
        self.native.closed, self.native.line = 1, -1
        self._line.close()


class ShmShardChannel(ShardChannel):
    """The shard's end: it makes the region and sends it, with its doorbell, to the router's mailbox."""

    native: NativeChannel

    def __init__(
        self,
        router_id: str,
        mailbox: str,
        bell: ShmDoorbell,
        request_capacity: int,
        reply_capacity: int,
        line: LifeLine,
    ) -> None:
        self.router_id = router_id
        self._line = line
        self._bell = bell
        size = _CONTROL_BYTES + request_capacity + reply_capacity
        self.region = SharedRegion.create(size, "pair", reserved=_CONTROL_BYTES)
        bell.add_ringers(1)
        try:
            FdMailbox.send(mailbox, [bell.region.descriptor, self.region.descriptor], _MAILBOX_TIMEOUT_S)
        except BaseException:
            bell.add_ringers(-1)
            raise
        finally:
            self.region.drop_descriptor()
        self.recv_buffer = self.region.bytes[_CONTROL_BYTES : _CONTROL_BYTES + request_capacity]
        self.send_buffer = self.region.bytes[_CONTROL_BYTES + request_capacity :]
        self.native = NativeChannel.of(KIND_SHM, self.recv_buffer, self.send_buffer)
        self.native.words = self.region.address
        self._address = ctypes.addressof(self.native)
        self._library = data_plane()

    def poll(self) -> int:
        native = self.native
        if self.closed:
            return NOT_YET
        if self._library is not None:
            nbytes = int(self._library.data_plane_poll(self._address))
        else:
            native.current, nbytes = _poll(self.region.address, native.answered)
        if nbytes > len(self.recv_buffer):
            logger.error(
                "router %s posted %d bytes into a buffer of %d; dropping it",
                self.router_id, nbytes, len(self.recv_buffer),
            )  # fmt: skip
            self.close()
            return NOT_YET
        return nbytes

    def reply(self, nbytes: int) -> None:
        native = self.native
        if nbytes > len(self.send_buffer):
            raise ValueError(f"a reply of {nbytes} bytes does not fit into {len(self.send_buffer)}")
        if self._library is not None:
            self._library.data_plane_reply(self._address, nbytes)
        else:
            native.answered = native.current
            _reply(self.region.address, native.current, nbytes)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.native.closed = 1
            self._bell.add_ringers(-1)
        self._line.close()
