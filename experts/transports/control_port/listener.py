"""The shard's control port: one thread accepts, shakes hands with and watches everybody, within fixed limits.

A stranger costs a socket and a few hundred bytes until its handshake times out or newer ones push it out. Only who has
proven itself (`handshake`) is heard. What then takes long (checking a hello, mapping memory, building a communicator)
runs in a small pool of threads; a shard that reads weights gets a thread of its own, as it reads for long.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from experts.protocol.secret import MeshSecret
from experts.transports.base import ShardChannel
from experts.transports.control import Hello, LifeLine, prepare
from experts.transports.control_port.handshake import READER, HandshakeError, OtherSecretError, ServingHandshake
from experts.transports.control_port.visitor import (
    ChannelOpener,
    Complaints,
    OtherIncarnationError,
    PortLimits,
    Visitor,
    WeightsOpener,
)
from experts.transports.tls.identity import TlsIdentity, problem_of

logger = logging.getLogger(__name__)

PROVE_TIMEOUT_S = 5.0  # for three short messages; a stranger holds its place no longer
_READ_BYTES = 1 << 16
_MAX_REASON = 4000  # characters of a refusal
_OPENERS = 4
_BACKLOG = 128
_PAUSE_S = 0.1  # before accepting again, out of descriptors
_STOP_TIMEOUT_S = 10.0


class ControlListener:
    """Accepts routers, opens a channel for each, and watches their lifelines."""

    def __init__(
        self,
        bind_host: str,
        open_channel: ChannelOpener,
        on_open: Callable[[ShardChannel], None],
        on_close: Callable[[ShardChannel], None],
        handshake_timeout_s: float,
        open_weights: WeightsOpener | None = None,
        *,
        secret: Callable[[], MeshSecret] = MeshSecret.from_environment,
        limits: PortLimits | None = None,
        tls: TlsIdentity | None = None,
    ) -> None:
        """`secret`: the one to know at that moment. `tls`: every connection has to have it.

        `handshake_timeout_s`: from the first byte to the last of a hello. `on_open` and `on_close` are called by the
        thread that watches, so they must not take long.
        """
        self._open_channel, self._open_weights = open_channel, open_weights
        self._on_open, self._on_close = on_open, on_close
        self._handshake_timeout_s = handshake_timeout_s
        self._secret = secret
        self._tls = tls
        self._limits = limits or PortLimits()
        self._server = socket.create_server((bind_host, 0), backlog=_BACKLOG)
        self._server.setblocking(False)
        self.port: int = self._server.getsockname()[1]
        self._visitors: dict[int, Visitor] = {}  # by descriptor
        self._arriving: dict[int, Visitor] = {}  # those of them whose hello is not there yet, oldest first
        self._pairs: Counter[str] = Counter()  # by router
        self._lock = threading.Lock()
        self._tasks: deque[Callable[[], None]] = deque()  # for the watching thread
        self._ended = False  # it takes no more of them
        self._stopped = threading.Event()
        self._opening = 0
        self._accept_at_s = 0.0
        self._complaints = Complaints()
        self._pool = ThreadPoolExecutor(_OPENERS, thread_name_prefix="shard-open")
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._bell, select.EPOLLIN)
        self._epoll.register(self._server.fileno(), select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="shard-control", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop accepting and drop every router and reader. Idempotent."""
        self._stopped.set()
        self._do(lambda: None)
        if threading.current_thread() is not self._thread:
            self._thread.join(_STOP_TIMEOUT_S)

    # The watching thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopped.is_set():
            for fd, events in self._epoll.poll(self._patience_s()):
                if fd == self._bell:
                    os.eventfd_read(self._bell)
                elif fd == self._server.fileno():
                    self._accept()
                elif fd in self._visitors:
                    self._attend(self._visitors[fd], events)
            while self._tasks:
                self._tasks.popleft()()
            self._look_at_the_clock()
        with self._lock:
            self._ended = True
        while self._tasks:
            self._tasks.popleft()()
        for visitor in list(self._visitors.values()):
            self._drop(visitor)
        self._server.close()
        self._epoll.close()
        os.close(self._bell)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _do(self, task: Callable[[], None]) -> bool:
        """Have the watching thread do something. False: it has ended."""
        with self._lock:
            if self._ended:
                return False
            self._tasks.append(task)
            os.eventfd_write(self._bell, 1)
            return True

    def _patience_s(self) -> float:
        times_s = [visitor.deadline_s for visitor in self._arriving.values()]
        if self._accept_at_s:
            times_s.append(self._accept_at_s)
        return -1 if not times_s else max(min(times_s) - time.monotonic(), 0.0) + 0.001

    def _look_at_the_clock(self) -> None:
        now_s = time.monotonic()
        for visitor in [visitor for visitor in self._arriving.values() if visitor.deadline_s <= now_s]:
            self._complaints.add(f"{visitor.where} did not finish its handshake in time")
            self._drop(visitor)
        if self._accept_at_s and self._accept_at_s <= now_s:
            self._accept_at_s = 0.0
            self._epoll.register(self._server.fileno(), select.EPOLLIN)

    def _accept(self) -> None:
        try:
            connection, address = self._server.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # Out of descriptors or memory, or a router that left the queue: others may still come.
            self._complaints.add(f"could not accept a connection: {error}")
            self._epoll.unregister(self._server.fileno())
            self._accept_at_s = time.monotonic() + _PAUSE_S
            return
        tunnel = None
        try:
            prepare(connection)
            if self._tls is not None:
                connection, tunnel = self._tls.serve(connection)
            connection.setblocking(False)
            handshake = ServingHandshake(self._secret(), self._limits.hello_bytes)
            deadline_s = time.monotonic() + min(PROVE_TIMEOUT_S, self._handshake_timeout_s)
            where = f"{address[0]}:{address[1]}"
            visitor = Visitor(LifeLine(connection, watched=True), handshake, where, deadline_s, tunnel=tunnel)
            if not self._make_room():
                raise ConnectionError(f"{self._limits.handshakes} handshakes are under way")
            self._epoll.register(connection.fileno(), select.EPOLLIN | select.EPOLLRDHUP)
        except (OSError, ValueError) as error:
            self._complaints.add(f"turned a connection away: {error}")
            connection.close()
            return
        self._visitors[connection.fileno()] = self._arriving[connection.fileno()] = visitor

    def _make_room(self) -> bool:
        if len(self._arriving) + self._opening < self._limits.handshakes:
            return True
        stranger = next((visitor for visitor in self._arriving.values() if not visitor.handshake.proven), None)
        if stranger is not None:
            self._drop(stranger)
        return stranger is not None

    def _attend(self, visitor: Visitor, events: int) -> None:
        try:
            if visitor.fd in self._arriving:
                self._read(visitor)
            elif events & (select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR):
                self._epoll.unregister(visitor.fd)
                visitor.left = True
                if visitor.busy:
                    visitor.line.close()  # what its thread waits for ends, and the thread reports
                else:
                    self._drop(visitor)
        except HandshakeError as error:
            with contextlib.suppress(OSError):
                visitor.line.socket.send(error.parting)
            remedy = (
                "; is it of another mesh, or was one side restarted?" if isinstance(error, OtherSecretError) else ""
            )
            self._complaints.add(f"turned {visitor.where} away: {error}{remedy}")
            self._drop(visitor)
        except OSError as error:
            problem = None if visitor.tunnel is None else visitor.tunnel.problem
            if problem is not None and not visitor.handshake.proven:
                self._complaints.add(f"turned {visitor.where} away: {problem_of(problem)}")
            logger.info("the control socket of %s broke: %s", visitor.where, error)
            self._drop(visitor)
        except Exception:  # one visitor must not cost the others theirs
            logger.exception("the control socket of %s is given up", visitor.where)
            self._drop(visitor)

    def _read(self, visitor: Visitor) -> None:
        handshake, arrived = visitor.handshake, visitor.arrived
        try:
            # Nothing past the hello may be consumed: the rest of the connection may be another's.
            data = visitor.line.socket.recv(min(handshake.wanted - len(arrived), _READ_BYTES))
        except BlockingIOError:
            return
        if not data:
            raise ConnectionError("it left during the handshake")
        arrived += data
        if len(arrived) < handshake.wanted:
            return
        was_known = handshake.proven
        reply = handshake.feed(bytes(arrived))
        arrived.clear()
        if reply and visitor.line.socket.send(reply) < len(reply):
            raise ConnectionError("it takes nothing")
        if handshake.proven and not was_known:
            visitor.deadline_s = time.monotonic() + self._handshake_timeout_s
        if handshake.message is not None:
            del self._arriving[visitor.fd]
            self._epoll.modify(visitor.fd, select.EPOLLRDHUP)
            visitor.busy = True
            self._opening += 1
            self._pool.submit(self._open, visitor)

    def _opened(self, visitor: Visitor, answer: dict[str, Any], serve: Callable[[], None] | None) -> None:
        """Its pair is open, or refused, or it may read weights."""
        visitor.busy = False
        self._opening -= 1
        try:
            if visitor.channel is not None:
                self._on_open(visitor.channel)
            sealed = visitor.handshake.seal(answer)
            if visitor.left or visitor.line.socket.send(sealed) < len(sealed):
                raise ConnectionError("it left before it was answered")
            if serve is not None:
                visitor.busy = True
                visitor.line.socket.settimeout(self._handshake_timeout_s)
                threading.Thread(target=self._serve, args=(visitor, serve), name="shard-weights", daemon=True).start()
            elif visitor.channel is None:
                self._drop(visitor)
        except (OSError, RuntimeError) as error:
            logger.info("the control socket of %s broke: %s", visitor.where, error)
            self._drop(visitor)

    def _drop(self, visitor: Visitor) -> None:
        """Forget a visitor, and tell it so by closing the connection."""
        fd = visitor.fd
        if self._visitors.get(fd) is visitor:
            del self._visitors[fd]
            self._arriving.pop(fd, None)
        if visitor.channel is not None:
            channel, visitor.channel = visitor.channel, None
            channel.close()
            self._on_close(channel)
        self._release(visitor)
        with contextlib.suppress(OSError, ValueError):  # closing is not enough: a transport may have a duplicate
            self._epoll.unregister(fd)
        visitor.line.close()
        if not visitor.busy:  # else its thread still has the descriptor
            visitor.line.socket.close()

    # Other threads ----------------------------------------------------------------------------------------------------

    def _open(self, visitor: Visitor) -> None:
        """Check a hello and open what it asks for."""
        serve: Callable[[], None] | None = None
        message = visitor.handshake.message
        assert message is not None
        try:
            if visitor.handshake.peer_role == READER:
                if self._open_weights is None:
                    raise ValueError("this shard hands out no weights")
                serve, answer = self._open_weights(message, visitor.line.socket, visitor.line)
            else:
                hello = Hello(**message)
                self._reserve(visitor, hello.router_id)
                visitor.channel, answer = self._open_channel(hello, visitor.line)
            answer = {"ok": True, **answer}
        except Exception as error:
            self._complaints.add(f"refused a router or shard: {error} (it is {visitor.where})")
            if not isinstance(error, TypeError | ValueError | OSError | RuntimeError):
                logger.error("this is a fault of the shard", exc_info=error)
            restarted = isinstance(error, OtherIncarnationError)
            answer = {"ok": False, "restarted": restarted, "error": str(error)[:_MAX_REASON]}
        if not self._do(lambda: self._opened(visitor, answer, serve)):
            if visitor.channel is not None:
                visitor.channel.close()
            visitor.line.socket.close()

    def _serve(self, visitor: Visitor, serve: Callable[[], None]) -> None:
        """Send weights until the reader leaves."""
        try:
            serve()
        except OSError as error:
            logger.info("a reader of weights left: %s", error)
        except Exception:
            logger.exception("a reader of weights is given up")
        visitor.busy = False
        if not self._do(lambda: self._drop(visitor)):
            visitor.line.socket.close()

    def _reserve(self, visitor: Visitor, router_id: str) -> None:
        """Count a pair. ValueError if there are too many."""
        limits = self._limits
        with self._lock:
            if self._pairs.total() >= limits.pairs:
                raise ValueError(f"this shard has {limits.pairs} pairs already (max_pairs)")
            if self._pairs[router_id] >= limits.pairs_per_router:
                raise ValueError(
                    f"router {router_id} has {limits.pairs_per_router} pairs with this shard already "
                    "(max_pairs_per_router)"
                )
            self._pairs[router_id] += 1
            visitor.router_id = router_id

    def _release(self, visitor: Visitor) -> None:
        with self._lock:
            if visitor.router_id is not None:
                self._pairs[visitor.router_id] -= 1
                if not self._pairs[visitor.router_id]:
                    del self._pairs[visitor.router_id]
                visitor.router_id = None
