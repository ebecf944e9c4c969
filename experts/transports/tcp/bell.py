"""How a shard's doorbell hears sockets, beside the routers that ring it in shared memory."""

from __future__ import annotations

import os
import select
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable

from experts.native.library import data_plane
from experts.transports import atomics

SOCKET_NEWS = 1 << 32


class SocketBell(ABC):
    """Waits for a word in memory and for sockets at once."""

    @abstractmethod
    def ring(self) -> None:
        """Wake the waiting thread, from any other of this process."""

    @abstractmethod
    def wait(self, seen: int, spin_ns: int, timeout_ns: int) -> int:
        """The word once it is no longer `seen`, plus SOCKET_NEWS if sockets have news; `seen` after `timeout_ns`."""

    @abstractmethod
    def set_ringers(self, count: int) -> None:
        """Say how many routers ring the word from other processes: without any, sockets are heard sooner."""


class NativeSocketBell(SocketBell):
    """The compiled one; pairs of TcpPair are known to it by `address`. native/socket_bell.h says how it waits."""

    def __init__(self, word: int, sleeping: int) -> None:
        """Over the words at these addresses, as `atomics.ring` has them. OSError if the kernel refuses."""
        library = data_plane()
        assert library is not None
        self._library = library
        self.address = checked(library.data_plane_bell_make(word, sleeping), "a shard cannot watch sockets")
        weakref.finalize(self, library.data_plane_bell_free, self.address).atexit = False

    def ring(self) -> None:
        self._library.data_plane_bell_ring(self.address)

    def wait(self, seen: int, spin_ns: int, timeout_ns: int) -> int:
        return int(self._library.data_plane_bell_wait(self.address, seen, spin_ns, timeout_ns))

    def set_ringers(self, count: int) -> None:
        self._library.data_plane_bell_ringers(self.address, count)


class PythonSocketBell(SocketBell):
    """Where nothing can be compiled: a thread watches the sockets and rings the word."""

    def __init__(self, word: int, sleeping: int) -> None:
        """As NativeSocketBell."""
        self._word, self._sleeping = word, sleeping
        self._epoll = select.epoll()
        self._listeners: dict[int, Callable[[], None]] = {}
        ring = weakref.WeakMethod(self.ring)
        thread = threading.Thread(target=_watch, args=(self._epoll, self._listeners, ring), daemon=True)
        thread.name = "shard-sockets"
        thread.start()
        weakref.finalize(self, self._epoll.close).atexit = False

    def watch(self, descriptor: int, on_news: Callable[[], None]) -> None:
        """Call `on_news` in the thread whenever the socket has bytes or room for more, or its peer left."""
        self._listeners[descriptor] = on_news
        self._epoll.register(descriptor, select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET)

    def unwatch(self, descriptor: int) -> None:
        """Watch it no more; before it is closed. Idempotent."""
        if self._listeners.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def ring(self) -> None:
        atomics.ring(self._word, self._sleeping)

    def wait(self, seen: int, spin_ns: int, timeout_ns: int) -> int:
        return int(atomics.wait_while_equal(self._word, self._sleeping, seen, spin_ns, timeout_ns))

    def set_ringers(self, count: int) -> None:
        """All ring the word."""


def socket_bell(word: int, sleeping: int) -> SocketBell:
    """A bell over the words at these addresses: compiled if this machine can. OSError if the kernel refuses."""
    return PythonSocketBell(word, sleeping) if data_plane() is None else NativeSocketBell(word, sleeping)


def checked(result: int, problem: str) -> int:
    """`result`. OSError with `problem` if it is negative: -errno."""
    if result < 0:
        raise OSError(-result, f"{problem}: {os.strerror(-result)}")
    return result


_LOOK_S = 5.0  # how often the thread looks whether its bell is still there


def _watch(
    epoll: select.epoll, listeners: dict[int, Callable[[], None]], ring: weakref.ref[Callable[[], None]]
) -> None:
    while not epoll.closed:
        try:
            events = epoll.poll(_LOOK_S)
        except (OSError, ValueError):  # closed
            return
        for descriptor, _ in events:
            listener = listeners.get(descriptor)
            if listener is not None:
                listener()
        rings = ring()
        if events and rings is not None:
            rings()
        del rings
