"""Lets other shards copy this shard's experts: who may, and out of which slot."""

from __future__ import annotations

import base64
import logging
import socket
import threading
from collections.abc import Callable
from typing import Any

from experts.checkpoint.fingerprint import Fingerprint
from experts.shard.slots import SlotTable
from experts.transports.control import LifeLine, OtherIncarnationError
from experts.transports.weights.frames import WeightsHello
from experts.transports.weights.source import Lent, WeightsSource, open_ring
from experts.transports.weights.staging import pieces_for

logger = logging.getLogger(__name__)

MAX_READERS = 16  # each has a thread, and a ring or pinned buffers of some MiB


class HandOut:
    """Opens connections for readers; the control listener calls `open`."""

    def __init__(self, slots: SlotTable, fingerprint: Fingerprint, incarnation: str) -> None:
        self._slots = slots
        self._fingerprint = fingerprint
        self._incarnation = incarnation
        self._readers: list[LifeLine] = []
        self._lock = threading.Lock()
        self.experts = 0
        self.bytes = 0

    def open(
        self, message: dict[str, Any], connection: socket.socket, line: LifeLine
    ) -> tuple[Callable[[], None], dict[str, Any]]:
        """See `WeightsOpener`: refuses who means another shard, model or layout, and more than MAX_READERS."""
        hello = WeightsHello(**message)
        if hello.incarnation != self._incarnation:
            raise OtherIncarnationError(
                f"this is another incarnation of the shard, the reader wants {hello.incarnation}"
            )
        slots = self._slots
        layout = slots.kernel.layout
        if not layout or hello.layout != layout:
            raise ValueError(f"this shard's slots are packed as {layout or 'nobody can copy'!r}, not {hello.layout!r}")
        for name, ours in slots.checkpoint.facts.items():
            if hello.facts.get(name) != ours:
                raise ValueError(f"the reader has {name} {hello.facts.get(name)}, this shard has {ours}")
        differing = self._fingerprint.differing(base64.b64decode(hello.weights, validate=True))
        if differing:
            raise ValueError(
                f"the reader has other weights than this shard: {differing[0]} and {len(differing) - 1} more"
            )
        with self._lock:
            self._readers = [reader for reader in self._readers if reader.gone() is None]
            if len(self._readers) >= MAX_READERS:
                raise ValueError(f"{MAX_READERS} readers already copy from this shard")
            self._readers.append(line)
        pieces = pieces_for(slots.kernel.shape.device)
        ring = open_ring(hello.mailbox) if hello.mailbox else None
        return WeightsSource(connection, ring, self._lend, pieces, self._count).serve, {}

    def _lend(self, layer: int, expert: int) -> Lent | None:
        lent = self._slots.lend(layer, expert)
        if lent is None:
            return None
        slot, digest, unchanged = lent
        return Lent(self._slots.kernel.slot_views(layer, slot), digest, unchanged)

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.experts += 1
            self.bytes += nbytes
