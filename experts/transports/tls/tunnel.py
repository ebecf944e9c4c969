"""Tunnels: the bytes of a TLS connection as a plain local socket, for whoever wants a descriptor to read and write.

Pairs in C++, epoll and copies of weights all work on descriptors, and the standard library's TLS on Python objects.
So one thread a process moves bytes between each TLS connection and one end of a socket pair; the other end is used as
the connection was. It costs a wake-up and two copies a message and side. An end that closes, closes the other.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import threading
from collections import deque

from experts.transports.control_port.handshake import TLS_BEGINS, WANTS_TLS, TlsMismatchError

_CHUNK = 1 << 16
_RECORD = 1 << 14  # what TLS carries in one piece, and a read returns at most
_TURNS = 32  # chunks of one tunnel before the others get their turn
_HUNG_UP = select.EPOLLHUP | select.EPOLLERR
_INWARDS, _OUTWARDS = 1, 2
_BOTH = _INWARDS | _OUTWARDS


class Tunnel:
    """One connection. Only the process's tunnel thread uses it, but for `problem`."""

    def __init__(self, outer: ssl.SSLSocket, inner: socket.socket) -> None:
        self.outer, self.inner = outer, inner
        self.problem: Exception | None = None
        """Why it ended, if TLS or the network ended it; set before the local end closes."""
        self.open = True
        self._shaking = True
        self._unseen = outer.server_side  # a peer that may speak without TLS
        self._wants = select.EPOLLIN  # what the handshake or a read waits for
        self._inwards, self._outwards = b"", b""  # on their way
        self.heard = (0, 0)
        """The interests that epoll knows."""

    def interests(self) -> tuple[int, int]:
        """Epoll's events for the outer and the inner socket."""
        outer = (self._wants if self._shaking or not self._inwards else 0) | (select.EPOLLOUT if self._outwards else 0)
        inner = (select.EPOLLOUT if self._inwards else 0) | (0 if self._shaking or self._outwards else select.EPOLLIN)
        return outer, inner

    def pump(self, ways: int, to_the_end: bool = False) -> bool:
        """Move what can be moved in these directions. Whether there may be more at once.

        A read that found less than it asked for is the last one, as epoll tells what comes later. Not for a side that
        hung up: `to_the_end` reads until nothing is left.
        """
        try:
            if self._shaking:
                ways = _BOTH
                self._wants = select.EPOLLIN
                if self._unseen:
                    self._look_at_first_byte()
                self.outer.do_handshake()
                self._shaking = False
            for _ in range(_TURNS):
                if ways & _INWARDS and not self._pump_inwards(to_the_end):
                    ways &= ~_INWARDS
                if ways & _OUTWARDS and not self._pump_outwards(to_the_end):
                    ways &= ~_OUTWARDS
                if not ways:
                    return False
            return True
        except (ssl.SSLWantReadError, BlockingIOError):
            return False
        except ssl.SSLWantWriteError:
            self._wants = select.EPOLLIN | select.EPOLLOUT
            return False
        except OSError as error:  # SSLError among them
            self.problem = error
            self.open = False
            return False

    def close(self) -> None:
        """End both sides."""
        self.open = False
        self.inner.close()
        self.outer.close()

    def _look_at_first_byte(self) -> None:
        """TlsMismatchError if it is none of TLS, after telling the peer so. BlockingIOError: none is here yet."""
        plain = socket.socket  # what SSLSocket hides
        first = plain.recv(self.outer, 1, socket.MSG_PEEK)
        if first and first != TLS_BEGINS:
            plain.recv(self.outer, _CHUNK)  # or closing would discard the answer
            plain.send(self.outer, WANTS_TLS)
            raise TlsMismatchError("it speaks without TLS, and this side with it")
        self._unseen = False

    def _pump_inwards(self, to_the_end: bool) -> bool:
        more = True
        if not self._inwards:
            self._wants = select.EPOLLIN
            try:
                self._inwards = self.outer.recv(_CHUNK)
            except ssl.SSLWantReadError:
                return False
            if not self._inwards:
                self.open = False
                return False
            more = to_the_end or len(self._inwards) >= _RECORD
        try:
            self._inwards = self._inwards[self.inner.send(self._inwards) :]
        except BlockingIOError:
            return False
        return more or bool(self._inwards)

    def _pump_outwards(self, to_the_end: bool) -> bool:
        more = True
        if not self._outwards:
            try:
                self._outwards = self.inner.recv(_CHUNK)
            except BlockingIOError:
                return False
            if not self._outwards:
                self.open = False
                return False
            more = to_the_end or len(self._outwards) == _CHUNK
        try:
            self._outwards = self._outwards[self.outer.send(self._outwards) :]
        except ssl.SSLWantWriteError:
            return False
        return more or bool(self._outwards)


class TunnelThread:
    """The process's one thread for all of them."""

    _lock = threading.Lock()
    _current: TunnelThread | None = None

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._bell, select.EPOLLIN)
        self._new: deque[Tunnel] = deque()
        self._tunnels: dict[int, Tunnel] = {}  # by both descriptors
        threading.Thread(target=self._run, name="mesh-tls", daemon=True).start()

    @classmethod
    def get(cls) -> TunnelThread:
        """The thread of this process, started on first use, and again in a forked child."""
        with cls._lock:
            if cls._current is None or cls._current.owner != os.getpid():
                cls._current = cls()
            return cls._current

    def add(self, tunnel: Tunnel) -> None:
        """Serve it until it ends. Any thread."""
        self._new.append(tunnel)
        os.eventfd_write(self._bell, 1)

    def _run(self) -> None:
        busy: set[Tunnel] = set()
        while True:
            hung_up: set[Tunnel] = set()
            ready = dict.fromkeys(busy, _BOTH)
            for fd, events in self._epoll.poll(0 if busy else -1):
                if fd == self._bell:
                    os.eventfd_read(self._bell)
                    continue
                tunnel = self._tunnels[fd]
                reads, writes = (_INWARDS, _BOTH) if fd == tunnel.outer.fileno() else (_OUTWARDS, _INWARDS)
                ways = (reads if events & select.EPOLLIN else 0) | (writes if events & select.EPOLLOUT else 0)
                if events & _HUNG_UP:
                    hung_up.add(tunnel)
                    ways = _BOTH
                ready[tunnel] = ready.get(tunnel, 0) | ways
            while self._new:
                tunnel = self._new.popleft()
                for descriptor in (tunnel.outer.fileno(), tunnel.inner.fileno()):
                    self._tunnels[descriptor] = tunnel
                    self._epoll.register(descriptor, 0)
                ready[tunnel] = _BOTH
            busy = {tunnel for tunnel, ways in ready.items() if tunnel.pump(ways, tunnel in hung_up)}
            for tunnel in ready:
                # A side that hung up is told again and again, and what cannot be delivered by now will not be.
                if not tunnel.open or (tunnel in hung_up and tunnel not in busy):
                    self._end(tunnel)
                else:
                    self._hear(tunnel)

    def _hear(self, tunnel: Tunnel) -> None:
        interests = tunnel.interests()
        for descriptor, wanted, heard in zip(
            (tunnel.outer.fileno(), tunnel.inner.fileno()), interests, tunnel.heard, strict=True
        ):
            if wanted != heard:
                self._epoll.modify(descriptor, wanted)
        tunnel.heard = interests

    def _end(self, tunnel: Tunnel) -> None:
        for descriptor in (tunnel.outer.fileno(), tunnel.inner.fileno()):
            self._epoll.unregister(descriptor)
            del self._tunnels[descriptor]
        with contextlib.suppress(OSError):
            tunnel.close()


def open_tunnel(outer: ssl.SSLSocket) -> tuple[socket.socket, Tunnel]:
    """The local end for what travels through `outer`, which the tunnel owns from now on. OSError from the kernel."""
    ours, inner = socket.socketpair()
    outer.setblocking(False)
    inner.setblocking(False)
    tunnel = Tunnel(outer, inner)
    TunnelThread.get().add(tunnel)
    return ours, tunnel
