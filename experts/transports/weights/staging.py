"""Views of a slot as pieces of host memory: the memory itself on the CPU, two pinned buffers in turn for a GPU.

The copies of a GPU run on a stream of their own, so compute does not wait for them, and while one buffer is sent or
received the other one is copied.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeAlias

import numpy as np
import torch

from experts.transports.weights.ring import CHUNK_BYTES

Pieces: TypeAlias = Generator[np.ndarray, None, None]
"""Close it, if not all pieces were taken: copies of a GPU may be under way."""

PIECE_BYTES = 32 * CHUNK_BYTES  # a multiple, as `ring` demands


class HostPieces:
    """Slots in host memory: pieces are the slots themselves."""

    def outgoing(self, views: list[torch.Tensor], piece_bytes: int = PIECE_BYTES) -> Pieces:
        """The bytes of `views` (uint8) in order, as arrays (uint8) that are valid until the next is asked for."""
        for view in views:
            memory = view.numpy()
            for at in range(0, len(memory), piece_bytes):
                yield memory[at : at + piece_bytes]

    def incoming(self, views: list[torch.Tensor], piece_bytes: int = PIECE_BYTES) -> Pieces:
        """Arrays to fill, in order; all is in `views` when the iterator has ended."""
        return self.outgoing(views, piece_bytes)


class StagedPieces(HostPieces):
    """Slots on a GPU; on the CPU it goes the same way, for tests."""

    def __init__(self, device: str) -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._buffers = [torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=self._cuda) for _ in range(2)]
        self._copied: list[torch.cuda.Event | None] = [None, None]

    def _copy(self, number: int, target: torch.Tensor, source: torch.Tensor) -> None:
        """Start a copy out of, or into, a buffer."""
        if self._stream is None:
            target.copy_(source)
            return
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        self._copied[number] = event

    def _await_copy(self, number: int) -> None:
        event, self._copied[number] = self._copied[number], None
        if event is not None:
            event.synchronize()

    def _cuts(self, views: list[torch.Tensor], piece_bytes: int) -> list[torch.Tensor]:
        step = min(piece_bytes, PIECE_BYTES)
        return [view[at : at + step] for view in views for at in range(0, len(view), step)]

    def outgoing(self, views: list[torch.Tensor], piece_bytes: int = PIECE_BYTES) -> Pieces:
        cuts = self._cuts(views, piece_bytes)
        for number, cut in enumerate(cuts[:1]):
            self._copy(number, self._buffers[number][: len(cut)], cut)
        for number, cut in enumerate(cuts):
            mine, other = number % 2, (number + 1) % 2
            self._await_copy(mine)
            if number + 1 < len(cuts):
                following = cuts[number + 1]
                self._copy(other, self._buffers[other][: len(following)], following)
            yield self._buffers[mine][: len(cut)].numpy()

    def incoming(self, views: list[torch.Tensor], piece_bytes: int = PIECE_BYTES) -> Pieces:
        try:
            for number, cut in enumerate(self._cuts(views, piece_bytes)):
                mine = number % 2
                self._await_copy(mine)
                buffer = self._buffers[mine][: len(cut)]
                yield buffer.numpy()
                self._copy(mine, cut, buffer)
        finally:  # also of a copy that failed: its slot may be written by somebody else next
            for mine in range(2):
                self._await_copy(mine)


def pieces_for(device: str) -> HostPieces:
    """How slots on `device` are read and written. Not for two copies at a time."""
    return StagedPieces(device) if torch.device(device).type == "cuda" else HostPieces()
