"""Pairs over TCP, for hosts without a faster way between them: the control connection itself, after the handshake.

One socket a pair, which is its lifeline too, and no thread. A router looks at the socket for `spin_us`, then sleeps on
it. A shard's compute thread hears all its sockets through the doorbell (`bell`) and reads them itself. What does
not fit into a socket's buffer leaves from the process's one I/O thread, so neither side waits for a slow reader.
`pair` has the frames.

A killed peer closes the socket. A vanished host answers neither data nor keep-alive probes: routers notice it at their
dispatch deadline, shards after half a minute.
"""

from __future__ import annotations

import logging
import secrets
from typing import Any

from experts.native.structs import LOST, NOT_YET
from experts.protocol.errors import ShardLostError, ShardRejectedError, ShardTimeoutError
from experts.transports.base import RouterLink, ShardChannel
from experts.transports.control import Hello, LifeLine
from experts.transports.shm import ShmDoorbell
from experts.transports.tcp.pair import TcpPair, tcp_pair

logger = logging.getLogger(__name__)


class TcpRouterLink(RouterLink):
    """The router's end."""

    def __init__(self, rank: int, line: LifeLine, pair: TcpPair) -> None:
        self.rank = rank
        self.transport = "tcp"
        self.send_buffer, self.recv_buffer = pair.send_buffer, pair.recv_buffer
        self.native = pair.link
        self._line = line
        self._pair = pair
        self._closed = False

    def post(self, nbytes: int) -> None:
        if nbytes > len(self.send_buffer):
            raise ValueError(f"a request of {nbytes} bytes does not fit into {len(self.send_buffer)}")
        if self._pair.send(nbytes) == LOST:
            raise ShardLostError(self.rank, self._why())

    def wait(self, deadline_s: float) -> int:
        nbytes = self._pair.wait(int(deadline_s * 1e9))
        if nbytes == NOT_YET:
            raise ShardTimeoutError(self.rank, "no reply over tcp before the dispatch deadline")
        if nbytes == LOST:
            raise ShardLostError(self.rank, self._why())
        return nbytes

    def close(self) -> None:
        self._closed = True
        self._pair.end()
        self._line.close()

    def _why(self) -> str:
        return "the link is closed" if self._closed else self._pair.why()


class TcpShardChannel(ShardChannel):
    """The shard's end."""

    def __init__(self, router_id: str, line: LifeLine, pair: TcpPair) -> None:
        self.router_id = router_id
        self.recv_buffer, self.send_buffer = pair.recv_buffer, pair.send_buffer
        self.native = pair.channel
        self._line = line
        self._pair = pair

    def poll(self) -> int:
        if self.closed:
            return -1
        nbytes = self._pair.receive()
        if nbytes == LOST:
            self._give_up()
        return max(nbytes, -1)

    def reply(self, nbytes: int) -> None:
        if nbytes > len(self.send_buffer):
            raise ValueError(f"a reply of {nbytes} bytes does not fit into {len(self.send_buffer)}")
        if self._pair.send(nbytes) == LOST:
            self._give_up()

    def close(self) -> None:
        self.closed = True
        self._pair.end()
        self._line.close()

    def _give_up(self) -> None:
        if not self.closed:
            logger.info("pair with router %s ended: %s", self.router_id, self._pair.why())
            self.close()


def connect_tcp(rank: int, hello: Hello, line: LifeLine, answer: dict[str, Any], spin_us: float) -> TcpRouterLink:
    """The router's end, given the shard's `answer` to `hello`. Raises a ShardError."""
    key = answer.get("key")
    if type(key) is not int or not 0 <= key < 1 << 64:
        raise ShardRejectedError(rank, f"its key of the pair is {key!r}, expected 64 bits")
    try:
        # A descriptor of its own: whoever closes the lifeline meanwhile, no call meets another file's number.
        pair = tcp_pair(line.duplicate(), key, hello.request_capacity, hello.reply_capacity, spin_us)
    except OSError as error:
        raise ShardLostError(rank, str(error)) from error
    return TcpRouterLink(rank, line, pair)


def open_tcp_channel(hello: Hello, line: LifeLine, bell: ShmDoorbell) -> tuple[TcpShardChannel, dict[str, Any]]:
    """The shard's end, and the fields of the answer. OSError if the kernel refuses."""
    key = secrets.randbits(64)
    sockets = bell.hear_sockets()
    pair = tcp_pair(line.duplicate(), key, hello.reply_capacity, hello.request_capacity, bell=sockets)
    return TcpShardChannel(hello.router_id, line, pair), {"key": key}
