"""What the two ends of a weights connection say to each other.

The reader connects to the control port of the shard that has the experts, as a `READER` of the mesh, and says what it
wants, `WeightsHello`; the shard answers. Then, little-endian, for each expert that the reader asks for, in the order
asked:

    reader  ASK:   layer int32 | expert int32
    shard   HEAD:  layer int32 | expert int32 | status int32 | zero int32 | bytes of the payload int64
            the slot's views one after the other, on this connection or through the ring (`ring`); only with SENT
            TAIL:  status int32 | zero int32 | sum uint64 | weighted sum uint64 | digest, 32 bytes; only after a payload

The shard sends out of a slot that serves. If the slot was released meanwhile, the tail says GONE, and what came is
worthless. A reader may ask for several experts before the first is there.

A reader that reads the shard's memory itself (`memory`) gets, instead of views and tail:

    shard   LOAN:  address int64 of the slot's counter of releases | its value int64 | views int32 | zero int32 |
                   sum uint64 | weighted sum uint64 | digest, 32 bytes
            PLACE: address int64 | bytes int64; for each view
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

ASK = struct.Struct("<ii")
HEAD = struct.Struct("<iiiiq")
TAIL = struct.Struct("<iiQQ32s")
LOAN = struct.Struct("<qqiiQQ32s")
PLACE = struct.Struct("<qq")
SENT, GONE = 0, 1
MAX_ASKED = 64  # experts that a reader may ask for ahead: their frames fit any socket's buffer


@dataclass(frozen=True)
class WeightsHello:
    """What a reader says first: which shard it means, and what its own slots look like."""

    incarnation: str
    layout: str
    """`ExpertKernel.layout`; must be the shard's own."""
    facts: dict[str, Any] = field(default_factory=dict)
    weights: str = ""
    """Both as in a router's `Hello`: the same model, the same weights."""
    mailbox: str = ""
    """Where to put the ring's descriptor; empty: send the bytes on this connection, or lend the memory."""
    pid: int = 0
    """The reader's process, if it wants to read the shard's memory itself. The answer has a `MemoryOffer`, or none."""
    pid_namespace: int = 0

    def __post_init__(self) -> None:
        """TypeError or ValueError for impossible values: the other end of a socket may be anything."""
        for name in ("incarnation", "layout", "weights", "mailbox"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"weights hello: {name} is {getattr(self, name)!r}, expected a string")
        for name in ("pid", "pid_namespace"):
            if type(getattr(self, name)) is not int or not 0 <= getattr(self, name) < 1 << 32:
                raise ValueError(f"weights hello: {name} is {getattr(self, name)!r}, expected a number")
        if not isinstance(self.facts, dict):
            raise TypeError(f"weights hello: facts is {self.facts!r}, expected an object")
