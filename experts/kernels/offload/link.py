"""How fast experts may come into places, all threads together."""

from __future__ import annotations

import threading
import time

_OVERSLEPT_S = 1e-4  # Linux wakes threads so much late


class Link:
    """Spaces copies so that no more than `bytes_per_s` come; None is no limit.

    A copy that is asked for while others run takes its turn after them, as on a real link.
    """

    def __init__(self, bytes_per_s: float | None) -> None:
        self._rate = bytes_per_s
        self._lock = threading.Lock()
        self._free_s = 0.0

    @property
    def limited(self) -> bool:
        """Whether copies wait for each other."""
        return self._rate is not None

    def book(self, nbytes: int) -> float:
        """Take the next turn of `nbytes`; returns when it ends (time.monotonic()), 0.0 without a limit."""
        if self._rate is None:
            return 0.0
        with self._lock:
            self._free_s = max(self._free_s, time.monotonic()) + nbytes / self._rate
            return self._free_s

    def wait(self, end_s: float) -> None:
        """Until a turn has ended: the copy takes at least so long."""
        while (left_s := end_s - time.monotonic()) > 0:
            time.sleep(max(left_s - _OVERSLEPT_S, 0.0))  # 0 lets other threads run
