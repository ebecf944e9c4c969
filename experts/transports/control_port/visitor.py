"""Who is at a shard's control port, what may be opened for them, and how many there may be."""

from __future__ import annotations

import logging
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from experts.transports.base import ShardChannel
from experts.transports.control import Hello, LifeLine
from experts.transports.control_port.handshake import ServingHandshake
from experts.transports.tls.tunnel import Tunnel

logger = logging.getLogger(__name__)

_MAX_HELLO_BYTES = 16 << 20  # a model of a trillion parameters has 200,000 tensors, whose hashes are a megabyte
_COMPLAINTS, _COMPLAINTS_S = 5, 10.0  # lines of the log, in so many seconds

ChannelOpener = Callable[[Hello, LifeLine], tuple[ShardChannel, dict[str, Any]]]
"""Opens the shard's end of a pair; returns it with the fields of the answer. Raises ValueError to refuse the router."""


WeightsOpener = Callable[[dict[str, Any], socket.socket, LifeLine], tuple[Callable[[], None], dict[str, Any]]]
"""Lets another shard read weights: takes its hello, returns what serves it until it leaves, and the fields of the
answer. Raises ValueError or TypeError to refuse it."""


class OtherIncarnationError(ValueError):
    """The router looks for a shard that is no more: it is not refused, it gets the next one's address."""


@dataclass(frozen=True)
class PortLimits:
    """How many may be at a shard's control port at a time."""

    handshakes: int = 64
    """Connections that are not answered yet; the oldest stranger among them makes room for the next one."""
    pairs: int = 256
    pairs_per_router: int = 16
    """Of one process: each worker of a router with tensor parallelism counts for itself."""
    hello_bytes: int = _MAX_HELLO_BYTES


class Complaints:
    """Lines of the log about strangers, at most a few in a while: they must not fill it."""

    def __init__(self) -> None:
        self._times_s: deque[float] = deque(maxlen=_COMPLAINTS)
        self._unsaid = 0

    def add(self, text: str) -> None:
        """Log `text`, or count it."""
        now_s = time.monotonic()
        if len(self._times_s) == _COMPLAINTS and self._times_s[0] > now_s - _COMPLAINTS_S:
            self._unsaid += 1
            return
        self._times_s.append(now_s)
        unsaid, self._unsaid = self._unsaid, 0
        logger.warning("%s%s", text, f" ({unsaid} such lines before it were left out)" if unsaid else "")


@dataclass(eq=False)
class Visitor:
    """One connection, from its first byte to its last."""

    line: LifeLine
    handshake: ServingHandshake
    where: str
    deadline_s: float
    arrived: bytearray = field(default_factory=bytearray)
    router_id: str | None = None  # of a pair that counts
    channel: ShardChannel | None = None
    busy: bool = False  # another thread opens its pair, or sends it weights
    left: bool = False
    tunnel: Tunnel | None = None  # with TLS, what `line` is the local end of

    @property
    def fd(self) -> int:
        """-1 once it is closed."""
        return self.line.socket.fileno()
