"""What an engine's steps brought since it started, with histograms of times that are fine enough for a p99.

vLLM's own histograms have a bound at every doubling or so; here a bound is a tenth above the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

LEAST_S, MOST_S, STEP = 1e-4, 100.0, 1.1
BOUNDS_S = LEAST_S * STEP ** np.arange(round(np.log(MOST_S / LEAST_S) / np.log(STEP)) + 1)
"""Upper bounds; one more bucket has none."""


class TimeCounts:
    """Times by bucket, counted since the process started."""

    def __init__(self) -> None:
        self._counts = np.zeros(len(BOUNDS_S) + 1, np.int64)

    def add(self, times_s: Sequence[float]) -> None:
        """Count some times in seconds."""
        if times_s:
            self._counts += np.bincount(np.searchsorted(BOUNDS_S, times_s), minlength=len(self._counts))

    @property
    def counts(self) -> list[int]:
        """How many times are at most as long as each of BOUNDS_S, and longer than the one before."""
        return self._counts.tolist()


def quantile_s(counts: np.ndarray, share: float) -> float | None:
    """The time that a `share` of the counted ones does not exceed, to a tenth; None without any. int64 [buckets] in.

    What is beyond the last bound counts as that bound.
    """
    total = int(counts.sum())
    if not total:
        return None
    upto = np.cumsum(counts)
    wanted = share * total
    bucket = int(np.searchsorted(upto, wanted))
    if bucket >= len(BOUNDS_S):
        return float(BOUNDS_S[-1])
    inside = (wanted - (upto[bucket] - counts[bucket])) / counts[bucket]
    return float(BOUNDS_S[bucket] * STEP ** (inside - 1))


@dataclass(frozen=True)
class Pulse:
    """One router's engine. Counters start at 0 with its process."""

    counted: bool = True  # False: no step was counted (ever, with `disable_log_stats`), so all of this is 0
    tokens: int = 0  # that came out, first ones among them
    running: int = 0  # requests
    waiting: int = 0
    kv_cache: float = 0.0  # share in use
    between: list[int] = field(default_factory=list)  # seconds between two tokens of a request, by bucket
    first: list[int] = field(default_factory=list)  # seconds from a request to its first token, by bucket
