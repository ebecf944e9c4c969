"""The time of a plan: searches are sized beforehand, in nominal seconds, and only cut short when they must be."""

from __future__ import annotations

import time
from collections.abc import Callable

SPEED_SHARE = 0.2  # of the latest part in the running mean of the speed


class SearchClock:
    """Runs the schedules of a plan and makes sure that they end in time.

    `deadline_s` is a `time.perf_counter` value, None for no deadline; `work` the nominal seconds of all searches of all
    `layers` together. While the work left fits into the time left, at the speed seen so far, schedules run in full and
    the result does not depend on the clock. Otherwise they all get shorter by the same factor, and `cut` is set.
    """

    def __init__(
        self,
        deadline_s: float | None = None,
        stopped: Callable[[], bool] | None = None,
        work: float = 0.0,
        layers: int = 1,
    ) -> None:
        self._deadline_s = deadline_s
        self.cut = False
        self._stopped = stopped or (lambda: False)
        self._work_left = work
        self._work_of_layer = work / layers
        self._layers_left = layers
        self._searching_s = 0.0
        self._speed = 0.0  # seconds for each nominal second, 0 until known
        # What a layer takes besides its schedules: the least seen, since the first may include loading compiled code.
        self._besides_s: float | None = None
        self._layer_start = (time.perf_counter(), 0.0)

    def left(self) -> float:
        """Seconds until the deadline, infinite if there is none. 0 or less counts as a cut."""
        if self._stopped():
            self.cut = True
            return 0.0
        if self._deadline_s is None:
            return float("inf")
        left = self._deadline_s - time.perf_counter()
        self.cut = self.cut or left <= 0
        return left

    def layer_done(self) -> None:
        """Note that a layer's searches have ended, whatever part of their work they did."""
        now = time.perf_counter()
        besides_s = now - self._layer_start[0] - (self._searching_s - self._layer_start[1])
        self._besides_s = besides_s if self._besides_s is None else min(self._besides_s, besides_s)
        self._layers_left -= 1
        self._work_left = self._work_of_layer * self._layers_left
        self._layer_start = (now, self._searching_s)

    def run_schedule(
        self, run: Callable[[float, float, int], None], iterations: int, work: float, chunks: int = 16
    ) -> None:
        """Call `run(begin, end, iterations)` on consecutive parts of a schedule of `work` nominal seconds."""
        per_chunk = max(1, iterations // chunks)
        for chunk in range(chunks):
            left = self.left()
            if left <= 0:
                break
            left -= (self._besides_s or 0.0) * (self._layers_left - 1)
            needed = self._speed * max(self._work_left, work / chunks)
            count = per_chunk
            if needed > left:
                self.cut = True
                count = max(1, int(per_chunk * max(0.0, left) / needed))
            start_s = time.perf_counter()
            run(chunk / chunks, (chunk + 1) / chunks, count)
            spent_s = time.perf_counter() - start_s
            self._searching_s += spent_s
            self._work_left = max(0.0, self._work_left - work / chunks)
            if chunk and work > 0:  # the first part may include loading compiled code
                speed = spent_s / (work / chunks * count / per_chunk)
                self._speed += SPEED_SHARE * (speed - self._speed) if self._speed else speed
