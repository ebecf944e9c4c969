"""One router <-> one shard: byte messages in fixed buffers, one request in flight.

    router                                         shard
    ------                                         -----
    pack into link.send_buffer
    link.post(nbytes)         ----- request ---->  doorbell rings; channel.poll() -> nbytes
                                                   read channel.recv_buffer, compute, fill channel.send_buffer
    link.wait(deadline)       <---- reply -------  channel.reply(nbytes)
    read link.recv_buffer

No collective spans two routers: every pair stands alone, so that a lost peer costs its own pair and nothing else. What
the bytes mean is `experts.protocol.wire`'s business; how they travel is that of the classes in `experts.transports`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch


class RouterLink(ABC):
    """The router's end of a pair."""

    rank: int
    transport: str
    """Which transport this is, for status and logs."""
    send_buffer: np.ndarray
    """uint8 [capacity], packed into directly by the dispatcher; owned by the router between wait() and post()."""
    recv_buffer: np.ndarray
    """uint8 [capacity], valid from wait() to the next post()."""
    send_tensor: torch.Tensor | None = None
    recv_tensor: torch.Tensor | None = None
    """uint8, on the transport's device: the rows of a message, where they travel apart from the rest of it (NCCL).
    The rest stands in the buffers as ever, and lengths count both."""

    @abstractmethod
    def post(self, nbytes: int) -> None:
        """Send the first `nbytes` of `send_buffer`. Does not wait for the shard. Raises ShardLostError."""

    @abstractmethod
    def wait(self, deadline_s: float) -> int:
        """Wait for the reply to the last post, at most until `deadline_s` on time.monotonic()'s clock.

        Returns the reply's length in bytes. Raises ShardTimeoutError or ShardLostError; the link is useless then and
        has to be closed, since a late reply could be taken for the next one.
        """

    @abstractmethod
    def close(self) -> None:
        """Give the pair up. Idempotent, never blocks; a late reply goes nowhere."""


class ShardChannel(ABC):
    """The shard's end of a pair."""

    router_id: str
    recv_buffer: np.ndarray
    """uint8 [capacity], valid from poll() to reply()."""
    send_buffer: np.ndarray
    """uint8 [capacity], filled before reply()."""

    @property
    def send_tensor(self) -> torch.Tensor | None:
        """Rows of the reply (uint8) where they travel apart, else None."""
        return None

    @property
    def recv_tensor(self) -> torch.Tensor | None:
        """Rows of the request (uint8) where they travel apart, else None."""
        return None

    closed: bool = False

    @abstractmethod
    def poll(self) -> int:
        """Length in bytes of a request that waits, or -1. Never blocks. Marks the channel closed when the peer left."""

    @abstractmethod
    def reply(self, nbytes: int) -> None:
        """Send the first `nbytes` of `send_buffer` as the answer to the request that poll() gave."""

    @abstractmethod
    def close(self) -> None:
        """Give the pair up. Idempotent, never blocks."""


class Doorbell(ABC):
    """What wakes a shard's one compute loop when any of its channels has work."""

    @abstractmethod
    def ring(self) -> None:
        """Wake the loop, from any thread (and, for shared memory, from any process)."""

    @abstractmethod
    def wait(self, timeout_s: float) -> bool:
        """Sleep until the next ring that was not yet seen, at most `timeout_s`. True if it rang."""
