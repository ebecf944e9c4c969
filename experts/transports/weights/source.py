"""The end that has the experts: sends their bytes out of slots that go on serving."""

from __future__ import annotations

import contextlib
import functools
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from experts.transports.shared_region import FdMailbox, SharedRegion
from experts.transports.weights.checksum import add_to_sums, new_sums
from experts.transports.weights.frames import ASK, GONE, HEAD, LOAN, MAX_ASKED, PLACE, SENT, TAIL
from experts.transports.weights.memory import sums_of
from experts.transports.weights.ring import RING_BYTES, RingEnd, warm_up
from experts.transports.weights.staging import HostPieces

IDLE_S = 60.0  # a reader that asks for nothing makes room for others
READING_S = 600.0  # the same for one that reads by itself, as it is silent while it does
STALL_S = 60.0  # a reader that takes nothing: longer than it may wait for its own compute loop
_CHECK_S = 0.05
_TCP_PIECE_BYTES = 1 << 20
_LARGE_BYTES = 4 << 20
_MAILBOX_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Lent:
    """An expert to be read: its slot's memory, what the table says of it, and whether it was not released since."""

    views: list[torch.Tensor]
    digest: bytes
    releases_1: np.ndarray
    """The table's int64 that counts releases of the slot: it stays where it is and changes under way."""
    releases: int

    @functools.cached_property
    def nbytes(self) -> int:
        """Of the views."""
        return sum(view.numel() for view in self.views)

    @functools.cached_property
    def loan(self) -> bytes:
        """The frames for a reader that reads the slot itself. Sums up the slot, which must be in host memory."""
        plain, weighted = sums_of([view.numpy() for view in self.views])
        counter = int(self.releases_1.ctypes.data)
        loan = LOAN.pack(counter, self.releases, len(self.views), 0, plain, weighted, self.digest)
        return loan + b"".join(PLACE.pack(view.data_ptr(), view.numel()) for view in self.views)

    def unchanged(self) -> bool:
        """Whether the slot was not released since it was lent."""
        return int(self.releases_1[0]) == self.releases


def open_ring(mailbox: str) -> RingEnd:
    """A new ring, handed to the reader's `mailbox`. ValueError if that cannot be reached."""
    warm_up()
    region = SharedRegion.create(RING_BYTES, "weights")
    try:
        FdMailbox.send(mailbox, [region.descriptor], _MAILBOX_TIMEOUT_S)
    finally:
        region.drop_descriptor()
    return RingEnd(region)


class WeightsSource:
    """One reader's connection."""

    def __init__(
        self,
        connection: socket.socket,
        ring: RingEnd | None,
        lend: Callable[[int, int], Lent | None],
        pieces: HostPieces,
        on_sent: Callable[[int], None],
        lends_memory: bool = False,
    ) -> None:
        self._connection = connection
        self._ring = ring
        self._lend = lend
        self._pieces = pieces
        self._on_sent = on_sent
        self._lends_memory = lends_memory
        self._asks = b""
        self._loans = b""

    def serve(self) -> None:
        """Send what is asked for until the reader leaves. OSError if the connection breaks."""
        while (asked := self._next_ask()) is not None:
            lent = self._lend(*asked)
            if lent is None:
                self._connection.sendall(self._loans + HEAD.pack(*asked, GONE, 0, 0))
                self._loans = b""
                continue
            nbytes = lent.nbytes
            if self._lends_memory:
                self._loans += HEAD.pack(*asked, SENT, 0, nbytes) + lent.loan
                self._on_sent(nbytes)
                if nbytes > _LARGE_BYTES:  # summing up the next one takes longer than a system call
                    self._connection.sendall(self._loans)
                    self._loans = b""
                continue
            self._connection.sendall(HEAD.pack(*asked, SENT, 0, nbytes))
            sums = new_sums()
            with contextlib.closing(self._pieces.outgoing(lent.views)) as outgoing:
                for piece in outgoing:
                    self._send(piece, sums)
            status = SENT if lent.unchanged() else GONE
            self._on_sent(nbytes)
            self._connection.sendall(TAIL.pack(status, 0, int(sums[0]), int(sums[1]), lent.digest))

    def _next_ask(self) -> tuple[int, int] | None:
        """The next (layer, expert), None if the reader left. Loans go out together, as they are small."""
        if len(self._asks) < ASK.size:
            self._connection.sendall(self._loans)
            self._loans = b""
            self._connection.settimeout(READING_S if self._lends_memory else IDLE_S)
            while len(self._asks) < ASK.size:
                try:
                    more = self._connection.recv(MAX_ASKED * ASK.size)
                except TimeoutError:
                    return None
                if not more:
                    return None
                self._asks += more
            self._connection.settimeout(STALL_S)
        layer, expert = ASK.unpack_from(self._asks)
        self._asks = self._asks[ASK.size :]
        return layer, expert

    def _send(self, piece: np.ndarray, sums: np.ndarray) -> None:
        if self._ring is None:
            for at in range(0, len(piece), _TCP_PIECE_BYTES):
                part = piece[at : at + _TCP_PIECE_BYTES]
                add_to_sums(int(part.ctypes.data), len(part), sums)
                self._connection.sendall(part.data)
            return
        done, moved_s = 0, time.monotonic()
        while done < len(piece):
            sent = self._ring.write(piece[done:], sums, _CHECK_S)
            done += sent
            if sent:
                moved_s = time.monotonic()
            elif time.monotonic() > moved_s + STALL_S:
                raise TimeoutError(f"the reader took nothing for {STALL_S:.0f} s")
            if done < len(piece) and self._gone():
                raise ConnectionError("the reader left")

    def _gone(self) -> bool:
        # What the reader asked ahead waits in the socket before its end, so reading would not do.
        poller = select.poll()
        poller.register(self._connection, select.POLLRDHUP)
        return bool(poller.poll(0))
