"""Time of a search: a deadline, a wish to stop, and schedules that end in time without depending on the clock."""

from __future__ import annotations

import time
from collections.abc import Callable


class SearchClock:
    """Says when to stop. With no deadline and no `stopped`, never.

    `deadline` is a `time.perf_counter` value.
    """

    def __init__(self, deadline: float | None = None, stopped: Callable[[], bool] | None = None) -> None:
        self.deadline = deadline
        self.stopped = stopped or (lambda: False)

    def left(self) -> float:
        """Seconds until the deadline, infinite if there is none; 0 once told to stop."""
        if self.stopped():
            return 0.0
        return float("inf") if self.deadline is None else self.deadline - time.perf_counter()

    def share(self, fraction: float) -> SearchClock:
        """A clock with a part of the time that is left."""
        if self.deadline is None:
            return SearchClock(None, self.stopped)
        return SearchClock(time.perf_counter() + max(0.0, self.left()) * fraction, self.stopped)

    def run_schedule(self, run: Callable[[float, float, int], None], iterations: int, chunks: int = 16) -> None:
        """Call `run(begin, end, iterations)` on consecutive parts of a schedule of `iterations`.

        The parts are equal while the deadline is in no danger; else they get shorter, so that the schedule (its
        cooling) ends in time all the same. Stops between parts when told to.
        """
        begun = time.perf_counter()
        per_chunk = max(1, iterations // chunks)
        allowed = max(0.0, self.left())
        for chunk in range(chunks):
            if self.left() <= 0:
                return
            spent = time.perf_counter() - begun
            count = per_chunk
            if chunk and spent > allowed * chunk / chunks:
                speed = per_chunk * chunk / max(spent, 1e-9)
                count = max(1, min(per_chunk, int(speed * max(0.0, self.left()) / (chunks - chunk))))
            run(chunk / chunks, (chunk + 1) / chunks, count)
