"""The state of a pair over TCP, compiled and in Python: both speak the frames of native/tcp_pair.h.

    frame: uint64 nbytes | uint32 number | uint32 check | pad to 64 | the message's bytes          (little-endian)

The compiled form serves wherever C++ can be compiled. The Python form serves elsewhere, and is what the tests compare
the other with.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import socket
import struct
import time
import weakref
from abc import ABC, abstractmethod

import numpy as np

from experts.native.library import data_plane
from experts.native.structs import KIND_TCP, LOST, NOT_YET, NativeChannel, NativeLink
from experts.transports.tcp.bell import NativeSocketBell, PythonSocketBell, SocketBell, checked

_PAGE = mmap.PAGESIZE  # in front of a message, for the frame's head: so the message begins on a page
_HEAD = struct.Struct("<QII48x")
_LEFT, _GARBAGE, _TOO_LONG, _EARLY = -1001, -1002, -1003, -1004
_REASONS = {
    _LEFT: "its process closed the connection",
    _GARBAGE: "it sent bytes that are no frame of this pair",
    _TOO_LONG: "it sent a longer message than agreed",
    _EARLY: "it answered a message before it had all of it",
}


class TcpPair(ABC):
    """One end; a `bell` makes it a shard's."""

    link: NativeLink | None = None
    channel: NativeChannel | None = None
    """What compiled code sees of a router's end, and of a shard's."""

    def __init__(self, send_capacity: int, recv_capacity: int) -> None:
        # Pages are taken when they are first written, so small messages never cost large buffers.
        self._send, self._recv = _anonymous(_PAGE + send_capacity), _anonymous(_PAGE + recv_capacity)
        self.send_buffer, self.recv_buffer = self._send[_PAGE:], self._recv[_PAGE:]

    @abstractmethod
    def send(self, nbytes: int) -> int:
        """Send the first `nbytes` of the send buffer: 0, or LOST. Does not wait for the peer."""

    @abstractmethod
    def receive(self) -> int:
        """Length of the message in the receive buffer, until the next `send`; NOT_YET or LOST. Never blocks."""

    @abstractmethod
    def wait(self, deadline_ns: int) -> int:
        """`receive` once it is not NOT_YET, or at `deadline_ns` (time.monotonic_ns())."""

    @abstractmethod
    def end(self) -> None:
        """Send and receive nothing more, and hear nothing. Idempotent, any thread."""

    @abstractmethod
    def ended(self) -> int:
        """Why the pair ended: one of the codes here, or -errno; 0 while it lasts."""

    def why(self) -> str:
        """Why the pair ended, in words."""
        code = self.ended()
        return _REASONS.get(code) or (f"its connection broke: {os.strerror(-code)}" if code else "the link is closed")


class NativeTcpPair(TcpPair):
    """The compiled form."""

    def __init__(
        self,
        descriptor: int,
        key: int,
        send_capacity: int,
        recv_capacity: int,
        spin_us: float = 0.0,
        bell: NativeSocketBell | None = None,
    ) -> None:
        """Takes ownership of `descriptor`. OSError if the kernel refuses."""
        super().__init__(send_capacity, recv_capacity)
        library = data_plane()
        assert library is not None
        self._library = library
        made = library.data_plane_tcp_make(
            descriptor, key, self.send_buffer.ctypes.data, self.recv_buffer.ctypes.data, recv_capacity,
            None if bell is None else bell.address,
        )  # fmt: skip
        if made < 0:
            os.close(descriptor)
        self._address = checked(made, "no pair over TCP")
        # The arguments also keep what the compiled state points to.
        weakref.finalize(self, _free, library, self._address, self._send, self._recv, bell).atexit = False
        self._native: NativeLink | NativeChannel
        if bell is None:
            self._native = self.link = NativeLink.of(KIND_TCP, self.send_buffer, self.recv_buffer)
            self.link.spin_ns = int(spin_us * 1000)
            self._send_it, self._receive_it = library.data_plane_post, library.data_plane_progress
        else:
            self._native = self.channel = NativeChannel.of(KIND_TCP, self.recv_buffer, self.send_buffer)
            self._send_it, self._receive_it = library.data_plane_reply, library.data_plane_poll
        self._native.descriptor, self._native.own = descriptor, self._address
        self._reference = ctypes.addressof(self._native)

    def send(self, nbytes: int) -> int:
        return int(self._send_it(self._reference, nbytes))

    def receive(self) -> int:
        return int(self._receive_it(self._reference))

    def wait(self, deadline_ns: int) -> int:
        return int(self._library.data_plane_wait(self._reference, deadline_ns))

    def end(self) -> None:
        self._native.closed = 1
        self._library.data_plane_tcp_quiet(self._address)

    def ended(self) -> int:
        return int(self._library.data_plane_tcp_ended(self._address))


class PythonTcpPair(TcpPair):
    """The Python form. What does not fit into the socket's buffer is sent when somebody asks for the answer."""

    def __init__(
        self,
        descriptor: int,
        key: int,
        send_capacity: int,
        recv_capacity: int,
        spin_us: float = 0.0,
        bell: PythonSocketBell | None = None,
    ) -> None:
        """As NativeTcpPair."""
        super().__init__(send_capacity, recv_capacity)
        self._socket = socket.socket(fileno=descriptor)
        self._key, self._bell, self._spin_ns = key, bell, int(spin_us * 1000)
        self._sent = self._received = 0  # frames
        self._rest = memoryview(b"")
        self._frame = self._recv.data[_PAGE - _HEAD.size :]
        self._arrived, self._whole = 0, 0  # bytes of the frame that is being received; its length, once known
        self._waiting = NOT_YET
        self._readable = True
        self._ended = 0
        if bell is not None:
            bell.watch(descriptor, self._on_news)

    def send(self, nbytes: int) -> int:
        if self._rest:
            return self._end_with(_EARLY)
        head = _HEAD.pack(nbytes, self._sent, frame_check(self._key, nbytes, self._sent))
        self._sent = (self._sent + 1) & 0xFFFFFFFF
        self._send[_PAGE - _HEAD.size : _PAGE] = np.frombuffer(head, np.uint8)
        self._rest = self._send.data[_PAGE - _HEAD.size : _PAGE + nbytes]
        self._waiting = NOT_YET
        return self._push()

    def receive(self) -> int:
        if self._waiting != NOT_YET:
            return self._waiting
        if self._push() == LOST:
            return LOST
        while self._readable and not (self._bell and self._rest):
            self._readable = self._bell is None  # before the read: what comes meanwhile sets it again
            try:
                got = self._socket.recv_into(self._frame[self._arrived :], 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return NOT_YET
            except OSError as error:
                return self._end_with_error(error)
            if not got:
                return self._end_with(_LEFT)
            self._readable = True
            self._arrived += got
            why = self._look_at_frame()
            if why:
                return self._end_with(why)
            if self._whole and self._arrived == self._whole:
                self._waiting, self._arrived, self._whole = self._whole - _HEAD.size, 0, 0
                self._received = (self._received + 1) & 0xFFFFFFFF
                return self._waiting
        return NOT_YET

    def wait(self, deadline_ns: int) -> int:
        spin_until_ns = time.monotonic_ns() + self._spin_ns
        poller = select.poll()
        while (nbytes := self.receive()) == NOT_YET:
            now_ns = time.monotonic_ns()
            if now_ns >= deadline_ns:
                return NOT_YET
            if now_ns < spin_until_ns:
                os.sched_yield()
                continue
            poller.register(self._socket, select.POLLIN | (select.POLLOUT if self._rest else 0))
            poller.poll((deadline_ns - now_ns + 999_999) // 1_000_000)
        return nbytes

    def end(self) -> None:
        self._end_with(_LEFT)
        if self._bell is not None:
            self._bell.unwatch(self._socket.fileno())

    def ended(self) -> int:
        return self._ended

    def _on_news(self) -> None:
        self._readable = True

    def _push(self) -> int:
        if self._ended:
            return LOST
        try:
            while self._rest:
                self._rest = self._rest[self._socket.send(self._rest, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            return 0
        except OSError as error:
            return self._end_with_error(error)
        return 0

    def _look_at_frame(self) -> int:
        """Why it is no frame; 0 as long as it may be one."""
        if not self._whole and self._arrived >= _HEAD.size:
            nbytes, number, check = _HEAD.unpack(self._frame[: _HEAD.size])
            if number != self._received or check != frame_check(self._key, nbytes, number):
                return _GARBAGE
            if nbytes > len(self.recv_buffer):
                return _TOO_LONG
            self._whole = nbytes + _HEAD.size
        return _GARBAGE if self._whole and self._arrived > self._whole else 0

    def _end_with(self, why: int) -> int:
        self._ended = self._ended or why
        return LOST

    def _end_with_error(self, error: OSError) -> int:
        left = isinstance(error, ConnectionResetError | BrokenPipeError)
        return self._end_with(_LEFT if left else -(error.errno or 1))


def tcp_pair(
    descriptor: int,
    key: int,
    send_capacity: int,
    recv_capacity: int,
    spin_us: float = 0.0,
    bell: SocketBell | None = None,
) -> TcpPair:
    """One end over a connected socket, whose `descriptor` it takes over. `key`: 64 bits that both ends know.

    Compiled if this machine can. OSError if the kernel refuses.
    """
    if data_plane() is None:
        assert bell is None or isinstance(bell, PythonSocketBell)
        return PythonTcpPair(descriptor, key, send_capacity, recv_capacity, spin_us, bell)
    assert bell is None or isinstance(bell, NativeSocketBell)
    return NativeTcpPair(descriptor, key, send_capacity, recv_capacity, spin_us, bell)


def frame_check(key: int, nbytes: int, number: int) -> int:
    """The check word of a frame's head."""
    mask = 0xFFFFFFFFFFFFFFFF
    x = key ^ (nbytes * 0x9E3779B97F4A7C15 & mask) ^ number << 32
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return (x ^ x >> 31) >> 16 & 0xFFFFFFFF


def _anonymous(size: int) -> np.ndarray:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return np.frombuffer(mmap.mmap(-1, size, flags), np.uint8)


def _free(library: ctypes.CDLL, pair: int, *kept: object) -> None:
    library.data_plane_tcp_free(pair)
