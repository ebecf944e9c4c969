"""The control socket: a router and a shard agree on a pair, and each notices when the other is gone.

A shard listens on one TCP port (`control_port`). Whoever connects proves that it knows the mesh's secret, then says
what it wants in one message (`Hello`, or `weights.frames.WeightsHello` for weights), and the shard answers with one.
A router and a shard then keep the socket open as a lifeline: when a process dies, the kernel closes its end and the
other side sees it immediately. If a whole host vanishes, routers notice at their dispatch deadline, and shards when
TCP's keep-alive probes go unanswered.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import ssl
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from experts.protocol.errors import ShardLostError, ShardRejectedError, ShardTimeoutError
from experts.protocol.membership import CPU, ShardEndpoint, host_id
from experts.protocol.secret import SECRET_ENV, MeshSecret, MeshSecretError
from experts.protocol.wire import reply_capacity, request_capacity
from experts.transports.control_port.handshake import (
    ROUTER,
    AskingHandshake,
    OtherSecretError,
    OtherVersionError,
)
from experts.transports.tls.identity import TlsIdentity, problem_of

logger = logging.getLogger(__name__)

_DTYPES = ("float32", "bfloat16", "float16")
_MAX_COUNT = 1 << 20
_MAX_CAPACITY_BYTES = 1 << 31
_MAX_NAME = 256  # characters of what is logged and shown
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
    max_rows: int
    """Most rows in one message. With the sizes above, it says how large both buffers of the pair are."""
    details: dict[str, Any] = field(default_factory=dict)
    """What the transport itself needs, such as the name of the mailbox for shared memory."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the router's config.json says, by name: `ExpertCheckpoint.facts`."""
    weights: str = ""
    """The router's `Fingerprint` in base64."""
    deferred: bool = False
    """Whether routers that are not are served first: this one computes prompts for them."""

    def __post_init__(self) -> None:
        """TypeError or ValueError for impossible values: the other end of a socket may be anything."""
        for name in ("router_id", "transport", "incarnation", "dtype", "weights"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"hello: {name} is {getattr(self, name)!r}, expected a string")
            if name != "weights" and len(getattr(self, name)) > _MAX_NAME:
                raise ValueError(f"hello: {name} has {len(getattr(self, name))} characters, expected up to {_MAX_NAME}")
        for name in ("hidden_size", "top_k", "num_layers", "max_rows"):
            value = getattr(self, name)
            if type(value) is not int or not 0 < value <= _MAX_COUNT:
                raise ValueError(f"hello: {name} is {value!r}, expected an integer of 1 to {_MAX_COUNT}")
        if type(self.deferred) is not bool:
            raise TypeError(f"hello: deferred is {self.deferred!r}, expected true or false")
        if self.dtype not in _DTYPES:
            raise ValueError(f"hello: unknown dtype {self.dtype!r}, expected one of {', '.join(_DTYPES)}")
        for name in ("details", "facts"):
            if not isinstance(getattr(self, name), dict):
                raise TypeError(f"hello: {name} is {getattr(self, name)!r}, expected an object")
        if max(self.max_rows * self.top_k * 8, self.request_capacity, self.reply_capacity) > _MAX_CAPACITY_BYTES:
            raise ValueError(
                f"hello: {self.max_rows} rows of {self.row_bytes} bytes and {self.top_k} experts in one message, "
                f"expected at most {_MAX_CAPACITY_BYTES} bytes"
            )

    @property
    def row_bytes(self) -> int:
        """Of one row of activations."""
        return self.hidden_size * int(getattr(torch, self.dtype).itemsize)

    @property
    def request_capacity(self) -> int:
        """Bytes of the router's send buffer."""
        return request_capacity(self.max_rows, self.top_k, self.row_bytes)

    @property
    def reply_capacity(self) -> int:
        """Bytes of the router's receive buffer."""
        return reply_capacity(self.max_rows, self.row_bytes)


class LifeLine:
    """A connected control socket on which only the closing matters."""

    def __init__(self, connection: socket.socket, watched: bool = False) -> None:
        """`watched`: somebody waits for the end of the connection and closes it then (`listener`)."""
        self.socket = connection
        self._watched = watched
        self._lock = threading.Lock()
        self._gone: str | None = None

    @property
    def descriptor(self) -> int:
        """The socket's descriptor, for compiled code that looks whether the peer is gone; -1 once it is closed."""
        return self.socket.fileno()

    def local_address(self) -> str:
        """IP address of this end, as the peer can reach it."""
        return str(self.socket.getsockname()[0])

    def duplicate(self) -> int:
        """Another descriptor of the connection, for the caller to close. OSError if it is closed already."""
        return os.dup(self.socket.fileno())

    def gone(self) -> str | None:
        """Why the peer is gone, or None while it lives. Never blocks, and reads nothing."""
        with self._lock:
            if self._gone is None:
                try:
                    poller = select.poll()
                    poller.register(self.socket, select.POLLRDHUP)
                    if poller.poll(0):
                        self._gone = "its process closed the connection"
                except (OSError, ValueError) as error:
                    self._gone = f"its connection broke: {error}"
            return self._gone

    def close(self) -> None:
        """Tell the other side that this end is done. Idempotent."""
        with self._lock:
            self._gone = self._gone or "closed on this side"
            try:
                self.socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                logger.debug("the control socket was closed already")
            if not self._watched:
                self.socket.close()


def prepare(connection: socket.socket) -> None:
    """Send small messages at once, and notice a host that vanished."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    # While sent data is not acknowledged there are no probes, and TCP alone would go on for a quarter of an hour.
    (_, idle_s), (_, interval_s), (_, probes) = KEEPALIVE
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * (idle_s + interval_s * probes))


def choose_transport(requested: str, endpoint: ShardEndpoint, device: str) -> str:
    """The transport to try for one pair. "auto": between GPUs CUDA IPC within a host, else NCCL; between processes of
    which one has no GPU, shared memory within a host, else TCP."""
    if requested != "auto":
        return requested
    here = endpoint.host_id == host_id()
    if device.startswith("cuda") and endpoint.device != CPU:
        return "cuda_ipc" if here else "nccl"
    return "shm" if here else "tcp"


@dataclass(frozen=True, eq=False)
class Control:
    """A connection to a shard that has proven itself, and may be told what this process wants."""

    socket: socket.socket
    handshake: AskingHandshake = field(repr=False)

    @property
    def answer(self) -> dict[str, Any]:
        """What the shard answered to `shake_hands`."""
        return self.handshake.message or {}


def open_control(
    endpoint: ShardEndpoint,
    secret: MeshSecret | None,
    deadline_s: float,
    role: int = ROUTER,
    tls: TlsIdentity | None = None,
) -> Control:
    """Connect to a shard's control port and have both sides prove themselves, before `deadline_s` (time.monotonic()).

    `secret` None: this process's environment has it. ShardLostError, ShardTimeoutError, or ShardRejectedError if the
    two sides do not know the same secret, or this side none, or TLS fails.
    """
    rank, where = endpoint.rank, f"{endpoint.host}:{endpoint.port}"
    try:
        handshake = AskingHandshake(secret or MeshSecret.from_environment(), role)
        connection = socket.create_connection(
            (endpoint.host, endpoint.port), timeout=max(deadline_s - time.monotonic(), 0.001)
        )
    except MeshSecretError as error:
        raise ShardRejectedError(rank, str(error)) from error
    except TimeoutError as error:
        raise ShardTimeoutError(rank, f"no connection to {where} before the connect deadline") from error
    except OSError as error:
        raise ShardLostError(rank, f"cannot connect to {where}: {error}") from error
    tunnel = None
    try:
        prepare(connection)
        if tls is not None:
            connection, tunnel = tls.connect(connection, deadline_s)
        connection.sendall(handshake.greeting)
        while not handshake.proven:
            connection.sendall(handshake.feed(_receive(connection, handshake.wanted, deadline_s)))
        return Control(connection, handshake)
    except BaseException as error:
        connection.close()
        if isinstance(error, OtherSecretError):
            raise ShardRejectedError(
                rank,
                f"{where} holds another secret of the mesh; without a controller, set {SECRET_ENV} to the same value "
                "for all routers and shards, else restart the side whose mesh.secret_env has changed",
            ) from error
        if isinstance(error, OtherVersionError):
            raise ShardRejectedError(rank, f"{where}: {error}") from error
        refusal = tunnel.problem if tunnel is not None else error if isinstance(error, ssl.SSLError) else None
        if refusal is not None:
            raise ShardRejectedError(rank, f"{where}: {problem_of(refusal)}") from error
        if isinstance(error, OSError):
            raise _as_shard_error(rank, error) from error
        raise


def shake_hands(control: Control, rank: int, hello: Any, deadline_s: float) -> dict[str, Any]:
    """Send `hello`, a dataclass, and return the shard's answer. ShardError, if rejected with the shard's reason.

    Afterwards the socket blocks without a limit, and nothing past the answer was read from it.
    """
    connection, handshake = control.socket, control.handshake
    try:
        connection.settimeout(max(deadline_s - time.monotonic(), 0.001))
        connection.sendall(handshake.seal(asdict(hello)))
        while handshake.message is None:
            handshake.feed(_receive(connection, handshake.wanted, deadline_s))
    except (OSError, ValueError) as error:
        raise _as_shard_error(rank, error) from error
    answer = handshake.message
    if answer.get("restarted"):
        raise ShardLostError(rank, str(answer.get("error")))
    if not answer.get("ok"):
        raise ShardRejectedError(rank, str(answer.get("error", answer)))
    connection.settimeout(None)
    return answer


def _receive(connection: socket.socket, nbytes: int, deadline_s: float) -> bytes:
    """Exactly `nbytes`. TimeoutError, or ConnectionError if the peer closes first."""
    data = bytearray()
    while len(data) < nbytes:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        connection.settimeout(left_s)
        more = connection.recv(nbytes - len(data))
        if not more:
            raise ConnectionError("the peer closed the control socket during the handshake")
        data += more
    return bytes(data)


def _as_shard_error(rank: int, error: Exception) -> ShardLostError | ShardTimeoutError:
    if isinstance(error, TimeoutError):
        return ShardTimeoutError(rank, "no answer to the handshake before the connect deadline")
    return ShardLostError(rank, f"handshake failed: {error}")
