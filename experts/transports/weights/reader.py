"""The end that wants experts: fetches their bytes into slots that nobody uses yet."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections import deque
from dataclasses import replace

import numpy as np
import torch

from experts.protocol.membership import ShardEndpoint, host_id
from experts.transports.control import open_control, shake_hands
from experts.transports.shared_region import FdMailbox, SharedRegion
from experts.transports.weights.checksum import add_to_sums, new_sums
from experts.transports.weights.frames import ASK, HEAD, SENT, TAIL, WeightsHello
from experts.transports.weights.pace import Pace
from experts.transports.weights.ring import RING_BYTES, RingEnd, warm_up
from experts.transports.weights.staging import HostPieces

_CHECK_S = 0.05  # how often a wait looks whether the source is gone or the copy was called off


class SourceLostError(RuntimeError):
    """The source is gone or silent; nothing more will come over this connection."""


class NotCopiedError(RuntimeError):
    """This one expert did not come, or not whole; the connection is in order."""


class WeightsReader:
    """A connection to one shard that has experts. One thread uses it at a time."""

    def __init__(self, rank: int, connection: socket.socket, ring: RingEnd | None, stall_s: float) -> None:
        self.transport = "tcp" if ring is None else "shm"
        self._rank = rank
        self._connection = connection
        self._ring = ring
        self._stall_s = stall_s
        self._asked: deque[tuple[int, int]] = deque()

    @classmethod
    def connect(cls, endpoint: ShardEndpoint, hello: WeightsHello, deadline_s: float, stall_s: float) -> WeightsReader:
        """A connection to the shard at `endpoint`, before `deadline_s` (time.monotonic()): shm on one host, else tcp.

        ShardError, OSError or ValueError says why there is none. After `stall_s` without a byte that was asked for,
        the source counts as lost.
        """
        warm_up()
        hello = replace(hello, incarnation=endpoint.incarnation)
        connection = open_control(endpoint, deadline_s)
        mailbox = FdMailbox() if endpoint.host_id == host_id() else None
        try:
            shake_hands(connection, endpoint.rank, replace(hello, mailbox=mailbox.name if mailbox else ""), deadline_s)
            ring = None
            if mailbox is not None:
                region = SharedRegion(mailbox.receive(deadline_s, count=1)[0], RING_BYTES)
                region.drop_descriptor()
                ring = RingEnd(region)
            return cls(endpoint.rank, connection, ring, stall_s)
        except BaseException:
            connection.close()
            raise
        finally:
            if mailbox is not None:
                mailbox.close()

    def ask(self, layer: int, expert: int) -> None:
        """Have an expert sent; `receive` takes them in the order asked. SourceLostError."""
        try:
            self._connection.settimeout(self._stall_s)
            self._connection.sendall(ASK.pack(layer, expert))
        except OSError as error:
            raise SourceLostError(f"shard {self._rank}: {error}") from error
        self._asked.append((layer, expert))

    def receive(self, views: list[torch.Tensor], pieces: HostPieces, pace: Pace) -> bytes:
        """Fill `views` with the expert asked for first; returns its digest, when what stands there has the right sum.

        NotCopiedError, SourceLostError, or CopyCancelledError, after which the connection is of no use either.
        """
        asked, expected = self._asked.popleft(), sum(map(len, views))
        layer, expert, status, _, nbytes = HEAD.unpack(self._receive_exactly(HEAD.size, pace))
        if (layer, expert) != asked:
            raise SourceLostError(f"shard {self._rank} sent expert {expert} of layer {layer}, asked for {asked}")
        if status != SENT:
            raise NotCopiedError(f"shard {self._rank} does not hold it")
        if nbytes != expected:
            raise SourceLostError(f"shard {self._rank} sends {nbytes} bytes of an expert, expected {expected}")
        sums = new_sums()
        with contextlib.closing(pieces.incoming(views, pace.piece_bytes)) as incoming:
            for piece in incoming:
                pace.take(len(piece))
                self._fill(piece, sums, pace)
        status, _, plain, weighted, digest = TAIL.unpack(self._receive_exactly(TAIL.size, pace))
        if status != SENT:
            raise NotCopiedError(f"shard {self._rank} released it while it was copied")
        if (plain, weighted) != (int(sums[0]), int(sums[1])):
            raise NotCopiedError(f"what came from shard {self._rank} has another checksum")
        return bytes(digest)

    def close(self) -> None:
        """End the connection. Idempotent."""
        self._connection.close()

    def _receive_exactly(self, nbytes: int, pace: Pace) -> bytes:
        data = np.empty(nbytes, np.uint8)
        self._fill_from_socket(data, pace)
        return data.tobytes()

    def _fill(self, piece: np.ndarray, sums: np.ndarray, pace: Pace) -> None:
        if self._ring is None:
            self._fill_from_socket(piece, pace)
            add_to_sums(int(piece.ctypes.data), len(piece), sums)
            return
        done, moved_s = 0, time.monotonic()
        while done < len(piece):
            got = self._ring.read(piece[done:], sums, _CHECK_S)
            done += got
            if got:
                moved_s = time.monotonic()
            elif self.closed:
                raise SourceLostError(f"shard {self._rank} closed the connection")
            elif time.monotonic() > moved_s + self._stall_s:
                raise SourceLostError(f"nothing came from shard {self._rank} for {self._stall_s:g} s")
            pace.check()

    @property
    def closed(self) -> bool:
        """Whether the source has ended the connection. Never blocks."""
        poller = select.poll()
        poller.register(self._connection, select.POLLRDHUP)
        return bool(poller.poll(0))

    def _fill_from_socket(self, target: np.ndarray, pace: Pace) -> None:
        memory, done, moved_s = target.data, 0, time.monotonic()
        self._connection.settimeout(_CHECK_S)
        while done < len(target):
            try:
                got = self._connection.recv_into(memory[done:])
            except TimeoutError:
                if time.monotonic() > moved_s + self._stall_s:
                    raise SourceLostError(f"nothing came from shard {self._rank} for {self._stall_s:g} s") from None
                pace.check()
                continue
            except OSError as error:
                raise SourceLostError(f"shard {self._rank}: {error}") from error
            if not got:
                raise SourceLostError(f"shard {self._rank} closed the connection")
            done, moved_s = done + got, time.monotonic()
