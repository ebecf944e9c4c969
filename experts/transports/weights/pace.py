"""How fast several threads may copy: a limit on bytes a second, and way given to requests on a full machine."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable

from experts.transports.weights.ring import CHUNK_BYTES
from experts.transports.weights.staging import PIECE_BYTES

SHARE = 0.1
"""Of a core, at most, for copies while requests come and cores are short: so p99 stays near what it is without them."""
_REMEMBER_S = 1.0  # for how long a request, or a core that was taken away, counts
_PIECE_S = 0.005  # how long one piece may take at the limit: the smaller, the more evenly the bytes come
_GIVING_WAY_BYTES = 4 * CHUNK_BYTES  # a piece of some 0.2 ms, after which others have the core
_CHECK_S = 0.05


class CopyCancelledError(RuntimeError):
    """The copy was called off."""


class _Lane(threading.local):
    """What the thread has used so far."""

    cpu_s = 0.0
    taken_away = -1


class Pace:
    """Spaces pieces so that no more than `max_bytes_per_s` come in the long run; None is no limit.

    Cores are short when Linux took one away from a copying thread to run another (an involuntary switch). While that
    happens, and `requests`, the number answered so far, rises, all copying threads together use SHARE of a core.
    """

    def __init__(
        self, max_bytes_per_s: float | None, cancelled: Callable[[], bool], requests: Callable[[], int] = lambda: 0
    ) -> None:
        if max_bytes_per_s is not None and not max_bytes_per_s > 0:
            raise ValueError(f"max_bytes_per_s is {max_bytes_per_s}, expected more than 0, or None for no limit")
        self._rate = max_bytes_per_s
        self._cancelled = cancelled
        self._requests = requests
        self._lock = threading.Lock()
        self._next_s = 0.0
        self._lane = _Lane()
        self._seen_requests = requests()
        self._asked_until_s = self._full_until_s = self._break_until_s = 0.0

    @property
    def gives_way(self) -> bool:
        """Whether requests come and cores are short."""
        return time.monotonic() < min(self._asked_until_s, self._full_until_s)

    @property
    def piece_bytes(self) -> int:
        """How much to take at a time: a multiple of CHUNK_BYTES."""
        most = _GIVING_WAY_BYTES if self.gives_way else PIECE_BYTES
        if self._rate is None:
            return most
        return min(max(round(self._rate * _PIECE_S / CHUNK_BYTES), 1) * CHUNK_BYTES, most)

    def check(self) -> None:
        """CopyCancelledError if the copy was called off."""
        if self._cancelled():
            raise CopyCancelledError("cancelled")

    def take(self, nbytes: int) -> None:
        """Wait for the turn of `nbytes`, without the GIL. CopyCancelledError."""
        self.check()
        usage = resource.getrusage(resource.RUSAGE_THREAD)
        self._wait_until(self._end_of_break(usage.ru_utime + usage.ru_stime, usage.ru_nivcsw))
        if self._rate is None:
            return
        with self._lock:
            start_s = max(self._next_s, time.monotonic())
            self._next_s = start_s + nbytes / self._rate
        self._wait_until(start_s)

    def _end_of_break(self, cpu_s: float, taken_away: int) -> float:
        """When this thread, which has used `cpu_s` and lost a core `taken_away` times, may go on (time.monotonic())."""
        lane, now_s = self._lane, time.monotonic()
        first, spent_s = lane.taken_away < 0, cpu_s - lane.cpu_s
        lost_core, lane.cpu_s, lane.taken_away = taken_away > lane.taken_away, cpu_s, taken_away
        with self._lock:
            if (requests := self._requests()) != self._seen_requests:
                self._seen_requests, self._asked_until_s = requests, now_s + _REMEMBER_S
            if first:
                return now_s
            if lost_core:
                self._full_until_s = now_s + _REMEMBER_S
            if not self.gives_way:
                return now_s
            self._break_until_s = max(self._break_until_s, now_s) + spent_s * (1 / SHARE - 1)
            return self._break_until_s

    def _wait_until(self, instant_s: float) -> None:
        while (left_s := instant_s - time.monotonic()) > 0:
            time.sleep(min(left_s, _CHECK_S))
            self.check()
