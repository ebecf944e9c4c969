"""How the two ends of a pair exchange addresses before their process groups exist.

torch's TCPStore would do, but it looks up the names of both hosts as it connects. That takes many seconds if a name
server does not answer, and a router's engine waits meanwhile. A pair needs less: one socket, on which each end sends
what it sets and reads what the other end set.

    message: uint32 length of the key | uint32 length of the value | key | value      (network byte order)
"""

from __future__ import annotations

import contextlib
import secrets
import select
import socket
import struct
import time
from datetime import timedelta
from typing import Any

from torch.distributed import Store

_LENGTHS = struct.Struct("!II")
_MAX_BYTES = 1 << 20
_TOKEN_BYTES = 32
_MAX_STRANGERS = 16


class PairStore(Store):
    """A `torch.distributed` store for two users, over one connected socket. For one thread."""

    def __init__(self, connection: socket.socket, deadline_s: float) -> None:
        """Waits end with TimeoutError at `deadline_s` (time.monotonic()), or with ConnectionError if the peer left."""
        super().__init__()
        self._socket = connection
        self._deadline_s = deadline_s
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: bytes | str) -> None:
        """Set `value` at both ends."""
        data = value if isinstance(value, bytes) else value.encode()
        name = key.encode()
        self._values[key] = data
        self._socket.settimeout(self._left_s())
        self._socket.sendall(_LENGTHS.pack(len(name), len(data)) + name + data)

    def get(self, key: str) -> bytes:
        """The value of `key`, once either end has set it."""
        while key not in self._values:
            name_bytes, data_bytes = _LENGTHS.unpack(self.receive(_LENGTHS.size))
            if max(name_bytes, data_bytes) > _MAX_BYTES:
                raise ConnectionError(
                    f"a rendezvous message of {name_bytes} and {data_bytes} bytes, expected at most {_MAX_BYTES} each"
                )
            name = self.receive(name_bytes).decode()
            self._values[name] = self.receive(data_bytes)
        return self._values[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until every key is set. The store's own deadline holds, not `timeout`."""
        for key in keys:
            self.get(key)

    def has_extended_api(self) -> bool:
        """False: torch must not use more than set, get and wait."""
        return False

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._socket.close()

    def _left_s(self) -> float:
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the two ends of the pair did not meet before the deadline")
        return left_s

    def receive(self, length: int) -> bytes:
        """The next `length` bytes from the other end."""
        data = bytearray()
        while len(data) < length:
            self._socket.settimeout(self._left_s())
            more = self._socket.recv(length - len(data))
            if not more:
                raise ConnectionError("the other end of the pair left before it was open")
            data += more
        return bytes(data)


class Meeting:
    """The shard's side: a port that accepts only the router that knows the token."""

    def __init__(self, address: str) -> None:
        self._listener = socket.create_server((address, 0), backlog=4)
        self._token = secrets.token_hex(_TOKEN_BYTES // 2)

    def details(self) -> dict[str, Any]:
        """What the router needs for `connect_to_meeting`."""
        return {"meeting_port": self._listener.getsockname()[1], "meeting_token": self._token}

    def accept(self, deadline_s: float) -> PairStore:
        """Wait for the router until `deadline_s` (time.monotonic()). TimeoutError, or OSError after `close`.

        Strangers are heard side by side, so none of them keeps the router out; the oldest make room for newer ones.
        """
        said: dict[socket.socket, bytearray] = {}  # oldest first
        try:
            while True:
                poller = select.poll()
                for waiting in (self._listener, *said):
                    poller.register(waiting, select.POLLIN)
                sockets = {waiting.fileno(): waiting for waiting in (self._listener, *said)}
                ready = poller.poll(max(deadline_s - time.monotonic(), 0.0) * 1000)
                if not ready and time.monotonic() >= deadline_s:
                    raise TimeoutError("the router did not come to the meeting before the deadline")
                for fd, _ in ready:
                    if sockets[fd] is self._listener:
                        self._listener.settimeout(0)
                        with contextlib.suppress(BlockingIOError):
                            said[self._listener.accept()[0]] = bytearray()
                    elif self._knows_token(sockets[fd], said):
                        return PairStore(sockets[fd], deadline_s)
                while len(said) > _MAX_STRANGERS:
                    oldest = next(iter(said))
                    del said[oldest]
                    oldest.close()
        finally:
            for stranger in said:
                stranger.close()

    def _knows_token(self, connection: socket.socket, said: dict[socket.socket, bytearray]) -> bool:
        """Hear more of a token. Whoever says a wrong one, or leaves, is dropped; the router is taken out of `said`."""
        heard = said[connection]
        try:
            connection.settimeout(0)
            more = connection.recv(_TOKEN_BYTES - len(heard))
        except BlockingIOError:
            return False
        except OSError:
            more = b""
        heard += more
        if more and len(heard) < _TOKEN_BYTES:
            return False
        del said[connection]
        if secrets.compare_digest(heard, self._token.encode()):
            self.close()
            return True
        connection.close()
        return False

    def close(self) -> None:
        """Stop waiting for the router, from any thread. Idempotent."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def connect_to_meeting(host: str, details: dict[str, Any], deadline_s: float) -> PairStore:
    """The router's side of a `Meeting`, given its `details`. Raises OSError, KeyError or ValueError."""
    left_s = max(deadline_s - time.monotonic(), 0.001)
    connection = socket.create_connection((host, int(details["meeting_port"])), timeout=left_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(str(details["meeting_token"]).encode())
    return PairStore(connection, deadline_s)
