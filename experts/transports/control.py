"""The control socket: a router and a shard agree on a pair, and each notices when the other is gone.

A shard listens on one TCP port. A router connects and sends one JSON line (`Hello`), and the shard answers with one.
Both then keep the socket open as a lifeline: nothing more is sent on it, but when a process dies, the kernel closes its
end and the other side sees it immediately. Another shard that wants weights sends another first line
(`weights.frames.WeightsHello`). If a whole host vanishes, routers notice at their dispatch deadline, and
shards when TCP's keep-alive probes go unanswered.
"""

from __future__ import annotations

import json
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from experts.protocol.errors import ShardLostError, ShardRejectedError, ShardTimeoutError
from experts.protocol.membership import ShardEndpoint, host_id
from experts.transports.base import ShardChannel

logger = logging.getLogger(__name__)

PROTOCOL_VERSION = 3
_DTYPES = ("float32", "bfloat16", "float16")
# A model of a trillion parameters has 200,000 tensors, whose hashes are a megabyte.
_MAX_LINE_BYTES = 16 << 20
_PEEK_BYTES = 65536
_MAX_CAPACITY_BYTES = 1 << 31
# A vanished host is noticed after about half a minute of silence, so that a shard does not keep the buffers of dead
# routers forever. A dispatch has its own, much shorter deadline.
KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4))


@dataclass(frozen=True)
class Hello:
    """A router's first message: its identity, what it will send, and over which transport."""

    router_id: str
    transport: str
    incarnation: str
    dtype: str
    hidden_size: int
    top_k: int
    num_layers: int
    request_capacity: int
    reply_capacity: int
    details: dict[str, Any] = field(default_factory=dict)
    """What the transport itself needs, such as the name of the mailbox for shared memory."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the router's config.json says, by name: `ExpertCheckpoint.facts`."""
    weights: str = ""
    """The router's `Fingerprint` in base64."""
    version: int = PROTOCOL_VERSION

    def __post_init__(self) -> None:
        """TypeError or ValueError for impossible values: the other end of a socket may be anything."""
        for name in ("router_id", "transport", "incarnation", "dtype", "weights"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"hello: {name} is {getattr(self, name)!r}, expected a string")
        for name in ("hidden_size", "top_k", "num_layers", "request_capacity", "reply_capacity"):
            value = getattr(self, name)
            if type(value) is not int or not 0 < value <= _MAX_CAPACITY_BYTES:
                raise ValueError(f"hello: {name} is {value!r}, expected an integer of 1 to {_MAX_CAPACITY_BYTES}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"hello: unknown dtype {self.dtype!r}, expected one of {', '.join(_DTYPES)}")
        for name in ("details", "facts"):
            if not isinstance(getattr(self, name), dict):
                raise TypeError(f"hello: {name} is {getattr(self, name)!r}, expected an object")


class LifeLine:
    """A connected control socket on which only the closing matters."""

    def __init__(self, connection: socket.socket, watched: bool = False) -> None:
        """`watched`: a thread waits for the end of the connection and closes it then."""
        self._socket = connection
        self._watched = watched
        self._lock = threading.Lock()
        self._gone: str | None = None

    @property
    def descriptor(self) -> int:
        """The socket's descriptor, for compiled code that looks whether the peer is gone; -1 once it is closed."""
        return self._socket.fileno()

    def local_address(self) -> str:
        """IP address of this end, as the peer can reach it."""
        return str(self._socket.getsockname()[0])

    def duplicate(self) -> int:
        """Another descriptor of the connection, for the caller to close. OSError if it is closed already."""
        return os.dup(self._socket.fileno())

    def gone(self) -> str | None:
        """Why the peer is gone, or None while it lives. Never blocks, and reads nothing."""
        with self._lock:
            if self._gone is None:
                try:
                    if _await_end(self._socket, 0):
                        self._gone = "its process closed the connection"
                except (OSError, ValueError) as error:
                    self._gone = f"its connection broke: {error}"
            return self._gone

    def close(self) -> None:
        """Tell the other side that this end is done. Idempotent."""
        with self._lock:
            self._gone = self._gone or "closed on this side"
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                logger.debug("the control socket was closed already")
            if not self._watched:
                self._socket.close()


def _await_end(connection: socket.socket, timeout_ms: int | None) -> bool:
    """Whether the peer closes its end or dies within the time. What it sent stays to be read."""
    poller = select.poll()
    poller.register(connection, select.POLLRDHUP)
    return bool(poller.poll(timeout_ms))


def _prepare(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    # While sent data is not acknowledged there are no probes, and TCP alone would go on for a quarter of an hour.
    (_, idle_s), (_, interval_s), (_, probes) = KEEPALIVE
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * (idle_s + interval_s * probes))


def _send_line(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive_line(connection: socket.socket, deadline_s: float) -> dict[str, Any]:
    """One JSON line. TimeoutError, or ConnectionError if the peer closes before the line is complete."""
    data = bytearray()
    end = 0
    while not end:
        try:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            connection.settimeout(left_s)
            seen = connection.recv(_PEEK_BYTES, socket.MSG_PEEK)
            end = seen.find(b"\n") + 1
            data += connection.recv(end or len(seen))  # nothing after the line may be consumed
        except TimeoutError as error:
            raise TimeoutError("no complete line on the control socket before the deadline") from error
        if not seen:
            raise ConnectionError("the peer closed the control socket during the handshake")
        if len(data) > _MAX_LINE_BYTES:
            raise ConnectionError(f"a control line is longer than {_MAX_LINE_BYTES} bytes")
    try:
        message = json.loads(data)
    except ValueError as error:
        raise ConnectionError(f"expected a line of JSON on the control socket, got {bytes(data[:40])!r}") from error
    if not isinstance(message, dict):
        raise ConnectionError(f"expected a JSON object on the control socket, got {type(message).__name__}")
    return message


def choose_transport(requested: str, endpoint: ShardEndpoint, device: str) -> str:
    """The transport for one pair. "auto": NCCL if the router is on a GPU, shared memory within a host, else TCP."""
    if requested != "auto":
        return requested
    if device.startswith("cuda"):
        return "nccl"
    return "shm" if endpoint.host_id == host_id() else "tcp"


def open_control(endpoint: ShardEndpoint, deadline_s: float) -> socket.socket:
    """Connect to a shard's control port before `deadline_s` (time.monotonic()). ShardLostError or ShardTimeoutError."""
    try:
        connection = socket.create_connection(
            (endpoint.host, endpoint.port), timeout=max(deadline_s - time.monotonic(), 0.001)
        )
    except TimeoutError as error:
        raise ShardTimeoutError(
            endpoint.rank, f"no connection to {endpoint.host}:{endpoint.port} before the connect deadline"
        ) from error
    except OSError as error:
        raise ShardLostError(endpoint.rank, f"cannot connect to {endpoint.host}:{endpoint.port}: {error}") from error
    _prepare(connection)
    return connection


def shake_hands(connection: socket.socket, rank: int, hello: Any, deadline_s: float) -> dict[str, Any]:
    """Send `hello`, a dataclass, and return the shard's answer. ShardError, if rejected with the shard's reason."""
    try:
        _send_line(connection, asdict(hello))
        answer = _receive_line(connection, deadline_s)
    except TimeoutError as error:
        raise ShardTimeoutError(rank, "no answer to the handshake before the connect deadline") from error
    except (OSError, ValueError) as error:
        raise ShardLostError(rank, f"handshake failed: {error}") from error
    if answer.get("restarted"):
        raise ShardLostError(rank, str(answer.get("error")))
    if not answer.get("ok"):
        raise ShardRejectedError(rank, str(answer.get("error", answer)))
    connection.settimeout(None)
    return answer


ChannelOpener = Callable[[Hello, LifeLine], tuple[ShardChannel, dict[str, Any]]]
"""Opens the shard's end of a pair; returns it with the fields of the answer. Raises ValueError to refuse the router."""


WeightsOpener = Callable[[dict[str, Any], socket.socket, LifeLine], tuple[Callable[[], None], dict[str, Any]]]
"""Lets another shard read weights: takes its first line, returns what serves it until it leaves, and the fields of the
answer. Raises ValueError or TypeError to refuse it."""


class OtherIncarnationError(ValueError):
    """The router looks for a shard that is no more: it is not refused, it gets the next one's address."""


class ControlListener:
    """The shard's side: accepts routers, opens a channel for each, and watches their lifelines."""

    def __init__(
        self,
        bind_host: str,
        open_channel: ChannelOpener,
        on_open: Callable[[ShardChannel], None],
        on_close: Callable[[ShardChannel], None],
        handshake_timeout_s: float,
        open_weights: WeightsOpener | None = None,
    ) -> None:
        self._open_weights = open_weights
        self._open_channel = open_channel
        self._on_open = on_open
        self._on_close = on_close
        self._handshake_timeout_s = handshake_timeout_s
        self._server = socket.create_server((bind_host, 0), backlog=64)
        self.port: int = self._server.getsockname()[1]
        self._lines: set[LifeLine] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        threading.Thread(target=self._accept, name="shard-accept", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError as error:
                if self._stopped.is_set():
                    return
                # Out of descriptors or memory, or a router that left the queue: others may still come.
                logger.warning("could not accept a router: %s", error)
                if self._stopped.wait(0.1):
                    return
                continue
            threading.Thread(target=self._serve, args=(connection,), name="shard-control", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        line = LifeLine(connection, watched=True)
        channel: ShardChannel | None = None
        try:
            _prepare(connection)
            deadline_s = time.monotonic() + self._handshake_timeout_s
            try:
                message = _receive_line(connection, deadline_s)
                if self._open_weights is not None and message.get("kind") == "weights":
                    serve, answer = self._open_weights(message, connection, line)
                else:
                    channel, answer = self._open_pair(message, line)
            except (TypeError, ValueError, OSError, RuntimeError) as error:
                logger.warning("refused a router or shard: %s", error)
                connection.settimeout(self._handshake_timeout_s)
                restarted = isinstance(error, OtherIncarnationError)
                _send_line(connection, {"ok": False, "restarted": restarted, "error": str(error)})
                return
            with self._lock:
                if self._stopped.is_set():
                    if channel is not None:
                        channel.close()
                    return
                self._lines.add(line)
            if channel is None:
                _send_line(connection, {"ok": True, **answer})
                serve()
                return
            self._on_open(channel)
            try:
                _send_line(connection, {"ok": True, **answer})
                connection.settimeout(None)
                _await_end(connection, None)
            finally:
                channel.close()
                self._on_close(channel)
        except OSError as error:
            logger.info("a control socket broke: %s", error)
        finally:
            with self._lock:
                self._lines.discard(line)
            line.close()
            connection.close()

    def _open_pair(self, message: dict[str, Any], line: LifeLine) -> tuple[ShardChannel, dict[str, Any]]:
        hello = Hello(**message)
        if hello.version != PROTOCOL_VERSION:
            raise ValueError(f"protocol version {hello.version}, this shard speaks {PROTOCOL_VERSION}")
        return self._open_channel(hello, line)

    def stop(self) -> None:
        """Stop accepting and drop every router and reader."""
        with self._lock:
            self._stopped.set()
            lines = list(self._lines)
        try:
            self._server.shutdown(socket.SHUT_RDWR)
        except OSError:
            logger.debug("the listener was shut down already")
        self._server.close()
        for line in lines:
            line.close()
