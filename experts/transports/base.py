"""The interface of every transport: one router <-> one shard, byte messages in fixed buffers, one request in flight.

    router                                         shard
    ------                                         -----
    pack into link.send_buffer
    link.post(nbytes)         ----- request ---->  doorbell rings; channel.poll() -> nbytes
                                                   read channel.recv_buffer, compute, fill channel.send_buffer
    link.wait(deadline_s)     <---- reply -------  channel.reply(nbytes)
    read link.recv_buffer

No collective spans two routers: each pair is independent, so a lost peer costs its own pair and nothing else.

To add a transport:

1. In a file of its own, subclass `RouterLink` and `ShardChannel`. If the transport has its own way to wake the shard,
   ring the `Doorbell` passed to `open_shard_channel` from a thread, as `torch_pair` does. Sockets are
   heard without one (`tcp`).
   With C++ of its own, set `native` (experts/native/link.h says how).
2. In `connect.py`, build the link in `connect` and the channel in `open_shard_channel`, and name the transport there.
3. Add its name to `TransportName` (experts.protocol.settings), and to `control.choose_transport` if "auto" may pick it.
4. Add its name to TRANSPORTS in tests/experts/transports/test_pairs.py: every transport must pass those tests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch

from experts.native.structs import NativeChannel, NativeLink


class RouterLink(ABC):
    """The router's end of a pair."""

    rank: int
    transport: str
    """Name of the transport, for status and logs."""
    send_buffer: np.ndarray
    """uint8 [capacity]. The dispatcher packs straight into it, between wait() and post()."""
    recv_buffer: np.ndarray
    """uint8 [capacity], valid from wait() to the next post()."""
    send_tensor: torch.Tensor | None = None
    recv_tensor: torch.Tensor | None = None
    """uint8, on the transport's device: the rows of a message where they travel separately (GPUs), else None. The rest
    of the message is in the buffers as usual, and lengths count both."""
    wants_hints = False
    """Whether the shard said that it would know what the next layer needs."""
    native: NativeLink | None = None
    """This end for compiled code, which posts and waits without Python's methods then. None: those are called."""

    @abstractmethod
    def post(self, nbytes: int) -> None:
        """Send the first `nbytes` of `send_buffer`. Does not wait for the shard. Raises ShardLostError."""

    @abstractmethod
    def wait(self, deadline_s: float) -> int:
        """Wait for the reply to the last post until `deadline_s` (time.monotonic()); returns its length in bytes.

        Raises ShardTimeoutError or ShardLostError. The link must be closed then: a late reply could be mistaken for
        the next one.
        """

    def trim(self) -> None:
        """Give back memory that the last messages did not need, where a transport can. Call it seldom, and only while
        no request is posted or packed; what the buffers hold is lost."""
        return

    @abstractmethod
    def close(self) -> None:
        """End the pair and discard any late reply. Idempotent, never blocks."""


class ShardChannel(ABC):
    """The shard's end of a pair."""

    router_id: str
    recv_buffer: np.ndarray
    """uint8 [capacity], valid from poll() to reply()."""
    send_buffer: np.ndarray
    """uint8 [capacity], filled before reply()."""
    native: NativeChannel | None = None
    """This end for compiled code, which polls and replies without Python's methods then. None: those are called."""

    @property
    def send_tensor(self) -> torch.Tensor | None:
        """Rows of the reply (uint8) where they travel separately, else None."""
        return None

    @property
    def recv_tensor(self) -> torch.Tensor | None:
        """Rows of the request (uint8) where they travel separately, else None."""
        return None

    closed: bool = False
    deferred: bool = False
    """Whether requests of others go first, see `defer`."""

    def defer(self) -> None:
        """The router computes prompts, and those that generate tokens shall not wait for it."""
        self.deferred = True
        if self.native is not None:
            self.native.deferred = 1

    @abstractmethod
    def poll(self) -> int:
        """Length in bytes of a waiting request, or -1. Never blocks. Marks the channel closed if the peer has left."""

    @abstractmethod
    def reply(self, nbytes: int) -> None:
        """Send the first `nbytes` of `send_buffer` as the reply to the request that poll() returned."""

    @abstractmethod
    def close(self) -> None:
        """End the pair. Idempotent, never blocks."""


class Doorbell(ABC):
    """Wakes a shard's compute loop when any of its channels has work."""

    @abstractmethod
    def ring(self) -> None:
        """Wake the loop, from any thread (and, for shared memory, from any process)."""

    @abstractmethod
    def wait(self, timeout_s: float) -> bool:
        """Sleep until a ring that was not seen yet, at most `timeout_s`. True if the bell rang."""
