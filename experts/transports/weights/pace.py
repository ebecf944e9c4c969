"""A limit on bytes a second that several threads share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from experts.transports.weights.ring import CHUNK_BYTES
from experts.transports.weights.staging import PIECE_BYTES

_PIECE_S = 0.005  # how long one piece may take at the limit: the smaller, the more evenly the bytes come
_CHECK_S = 0.05


class CopyCancelledError(RuntimeError):
    """The copy was called off."""


class Pace:
    """Spaces pieces so that no more than `max_bytes_per_s` come in the long run; None is no limit."""

    def __init__(self, max_bytes_per_s: float | None, cancelled: Callable[[], bool]) -> None:
        if max_bytes_per_s is not None and not max_bytes_per_s > 0:
            raise ValueError(f"max_bytes_per_s is {max_bytes_per_s}, expected more than 0, or None for no limit")
        self._rate = max_bytes_per_s
        self._cancelled = cancelled
        self._lock = threading.Lock()
        self._next_s = 0.0

    @property
    def piece_bytes(self) -> int:
        """How much to take at a time: a multiple of CHUNK_BYTES."""
        if self._rate is None:
            return PIECE_BYTES
        return min(max(round(self._rate * _PIECE_S / CHUNK_BYTES), 1) * CHUNK_BYTES, PIECE_BYTES)

    def check(self) -> None:
        """CopyCancelledError if the copy was called off."""
        if self._cancelled():
            raise CopyCancelledError("cancelled")

    def take(self, nbytes: int) -> None:
        """Wait for the turn of `nbytes`, without the GIL. CopyCancelledError."""
        self.check()
        if self._rate is None:
            return
        with self._lock:
            start_s = max(self._next_s, time.monotonic())
            self._next_s = start_s + nbytes / self._rate
        while (left_s := start_s - time.monotonic()) > 0:
            time.sleep(min(left_s, _CHECK_S))
            self.check()
