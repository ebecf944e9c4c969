"""The traffic of all routers in windows of time. `now_s` are seconds on any monotonic clock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from placement.traces.observation import Observation, merge_observations

REMEMBERED_WINDOWS, HALF_LIFE_WINDOWS = 8, 4
LARGEST_SAMPLE = 16_384  # tokens of a window that are kept


@dataclass(frozen=True, eq=False)
class Window:
    """All traffic that was reported from `begun_s` to `ended_s`."""

    begun_s: float
    ended_s: float
    seen: Observation

    @property
    def seconds(self) -> float:
        return self.ended_s - self.begun_s

    @property
    def steps_per_s(self) -> float:
        return self.seen.steps / max(self.seconds, 1e-9)

    @property
    def shares_LE(self) -> np.ndarray:
        """float64 [L, E]: each expert's share of its layer's traffic."""
        return shares_of(self.seen)


@dataclass
class Traffic:
    """The window in progress, and the last ones."""

    windows: deque[Window] = field(default_factory=lambda: deque(maxlen=REMEMBERED_WINDOWS))
    reports: int = 0
    tokens: int = 0
    _begun_s: float | None = None
    _seen: Observation | None = None
    _last: dict[str, tuple[int, float]] = field(default_factory=dict)  # number and time, by router

    def add(self, router_id: str, number: int, observation: Observation, now_s: float) -> bool:
        """Add a report; False if it came before. TraceError if it is of another model than the others."""
        if number <= self._last.get(router_id, (0, 0.0))[0]:
            return False
        if self._seen is not None:
            observation = merge_observations([self._seen, observation])
        else:
            self._begun_s = now_s if self._begun_s is None else self._begun_s
        self.tokens += observation.tokens - (0 if self._seen is None else self._seen.tokens)
        self.reports += 1
        self._last[router_id] = (number, now_s)
        self._seen = observation
        return True

    def heard_of(self, router_id: str, number: int, now_s: float) -> None:
        """The router asked, without anything to report."""
        self._last[router_id] = (max(number, self._last.get(router_id, (0, 0.0))[0]), now_s)

    def routers(self, now_s: float, within_s: float) -> int:
        """How many routers reported lately; others are forgotten."""
        self._last = {name: last for name, last in self._last.items() if now_s - last[1] <= 10 * within_s}
        return sum(now_s - heard_s <= within_s for _, heard_s in self._last.values())

    def restart(self, now_s: float) -> None:
        """Drop the window in progress: something changed in its middle."""
        self._seen, self._begun_s = None, now_s

    def close(self, now_s: float, window_s: float, least_tokens: int) -> Window | None:
        """The window in progress, if it is over and has enough sampled tokens; the next one begins."""
        if self._begun_s is None or self._seen is None or now_s - self._begun_s < window_s:
            return None
        if self._seen.sampled_tokens < least_tokens:
            return None
        window = Window(self._begun_s, now_s, _thinned(self._seen))
        self.windows.append(window)
        self.restart(now_s)
        return window


def shares_of(seen: Observation) -> np.ndarray:
    """float64 [L, E]: each expert's share of its layer's traffic."""
    counts_LE = seen.counts_LE
    return counts_LE / np.maximum(counts_LE.sum(1, keepdims=True), 1)


def pooled(windows: list[Window]) -> Observation:
    """Some windows as one, oldest first; each counts half of the one HALF_LIFE_WINDOWS after it."""
    ages = range(len(windows) - 1, -1, -1)
    return merge_observations([window.seen for window in windows], [0.5 ** (age / HALF_LIFE_WINDOWS) for age in ages])


def _thinned(seen: Observation) -> Observation:
    """With every second, fourth, ... of the sampled steps, if they are too many."""
    stride, total = 1, seen.sampled_tokens
    while total // stride > LARGEST_SAMPLE:
        stride *= 2
    if stride == 1:
        return seen
    kept = tuple(seen.sampled[::stride])
    return Observation(seen.layers, seen.counts_PLE, seen.tokens_P, seen.steps, kept)
