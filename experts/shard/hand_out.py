"""Lets other shards copy this shard's experts: who may, and out of which slot."""

from __future__ import annotations

import base64
import logging
import socket
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from experts.checkpoint.fingerprint import Fingerprint
from experts.shard.slots import SlotTable
from experts.transports.control import LifeLine
from experts.transports.control_port.visitor import OtherIncarnationError
from experts.transports.weights.frames import WeightsHello
from experts.transports.weights.memory import MemoryLender
from experts.transports.weights.source import Lent, WeightsSource, open_ring
from experts.transports.weights.staging import HostPieces, pieces_for

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
        self._memory = MemoryLender()
        self._lent: dict[tuple[int, int], Lent] = {}  # by (layer, slot), kept for their checksums
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
        pieces = pieces_for(slots.kernel.slot_device)
        if hello.pid:
            return self._open_memory(hello, connection, line, pieces)
        ring = open_ring(hello.mailbox) if hello.mailbox else None
        return WeightsSource(connection, ring, self._lend, pieces, self._count).serve, {}

    def _open_memory(
        self, hello: WeightsHello, connection: socket.socket, line: LifeLine, pieces: HostPieces
    ) -> tuple[Callable[[], None], dict[str, Any]]:
        """For a reader that wants to read this process. If it cannot, it leaves and comes back with a mailbox."""
        on_host = torch.device(self._slots.kernel.slot_device).type == "cpu"
        offer = None
        if on_host:
            offer = self._memory.offer(hello.pid, hello.pid_namespace, lambda: line.gone() is not None)
        if offer is None:
            return lambda: None, {}

        def serve() -> None:
            try:
                WeightsSource(connection, None, self._lend, pieces, self._count, lends_memory=True).serve()
            finally:
                line.close()
                self._memory.tidy_up()

        return serve, {"memory": asdict(offer)}

    def _lend(self, layer: int, expert: int) -> Lent | None:
        lent = self._slots.lend(layer, expert)
        if lent is None:
            return None
        slot, digest, releases_1, releases = lent
        known = self._lent.get((layer, slot))
        if known is None or known.releases != releases:  # a slot holds one expert between two releases
            known = Lent(self._slots.kernel.slot_views(layer, slot), digest, releases_1, releases)
            self._lent[layer, slot] = known
        return known

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.experts += 1
            self.bytes += nbytes
