"""The end that has the experts: sends their bytes out of slots that go on serving."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from experts.transports.shared_region import FdMailbox, SharedRegion
from experts.transports.weights.checksum import add_to_sums, new_sums
from experts.transports.weights.frames import ASK, GONE, HEAD, SENT, TAIL
from experts.transports.weights.ring import RING_BYTES, RingEnd, warm_up
from experts.transports.weights.staging import HostPieces

IDLE_S = 60.0  # a reader that asks for nothing makes room for others
STALL_S = 60.0  # a reader that takes nothing: longer than it may wait for its own compute loop
_CHECK_S = 0.05
_TCP_PIECE_BYTES = 1 << 20
_MAILBOX_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Lent:
    """An expert to be read: its slot's memory, what the table says of it, and whether it was not released since."""

    views: list[torch.Tensor]
    digest: bytes
    unchanged: Callable[[], bool]


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
    ) -> None:
        self._connection = connection
        self._ring = ring
        self._lend = lend
        self._pieces = pieces
        self._on_sent = on_sent

    def serve(self) -> None:
        """Send what is asked for until the reader leaves. OSError if the connection breaks."""
        while (asked := self._next_ask()) is not None:
            lent = self._lend(*asked)
            if lent is None:
                self._connection.sendall(HEAD.pack(*asked, GONE, 0, 0))
                continue
            nbytes = sum(map(len, lent.views))
            self._connection.sendall(HEAD.pack(*asked, SENT, 0, nbytes))
            sums = new_sums()
            with contextlib.closing(self._pieces.outgoing(lent.views)) as outgoing:
                for piece in outgoing:
                    self._send(piece, sums)
            status = SENT if lent.unchanged() else GONE
            self._on_sent(nbytes)
            self._connection.sendall(TAIL.pack(status, 0, int(sums[0]), int(sums[1]), lent.digest))

    def _next_ask(self) -> tuple[int, int] | None:
        self._connection.settimeout(IDLE_S)
        data = b""
        while len(data) < ASK.size:
            try:
                more = self._connection.recv(ASK.size - len(data))
            except TimeoutError:
                return None
            if not more:
                return None
            data += more
        self._connection.settimeout(STALL_S)
        layer, expert = ASK.unpack(data)
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
        poller = (
            select.poll()
        )  # what the reader asked ahead waits in the socket before its end, so reading would not do
        poller.register(self._connection, select.POLLRDHUP)
        return bool(poller.poll(0))
