"""What a router counts while it dispatches: plain numbers, read between steps, cheap enough for every layer.

What every layer adds to is in words that compiled code writes (native/counts.h); Python reads them, and adds to them
where it does the work itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from experts.native.structs import HISTOGRAM_WORDS, NativeRouterCounts
from experts.protocol.status import StageHistogram

# Upper bounds of the latency buckets in microseconds; the last bucket has none.
BUCKETS_US = (10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 50_000, 100_000, 500_000, 1_000_000, 5_000_000)
_BOUNDS_NS = np.array(BUCKETS_US, np.int64) * 1000


class Histogram:
    """Durations of one stage, in Prometheus' buckets before they are cumulated: sum in ns, count, buckets."""

    def __init__(self, words: np.ndarray | None = None) -> None:
        """A view of `words`, int64 [HISTOGRAM_WORDS]; words of its own if there are none."""
        self._words = np.zeros(HISTOGRAM_WORDS, np.int64) if words is None else words

    @property
    def sum_ns(self) -> int:
        """All durations together."""
        return int(self._words[0])

    @property
    def count(self) -> int:
        """How many durations were added."""
        return int(self._words[1])

    @property
    def buckets(self) -> np.ndarray:
        """How many of them are at most as long as each of BUCKETS_US, and longer than the one before."""
        return self._words[2:]

    def add(self, duration_ns: int) -> None:
        """Count one duration."""
        words = self._words
        words[0] += duration_ns
        words[1] += 1
        words[2 + int(_BOUNDS_NS.searchsorted(duration_ns))] += 1

    def snapshot(self) -> StageHistogram:
        """The counts so far."""
        return StageHistogram(self.sum_ns / 1000, self.count, self.buckets.tolist(), list(BUCKETS_US))


@dataclass
class RouterStats:
    """Counters since the router started; per-rank arrays grow with the placement."""

    num_ranks: int = 0
    steps: int = 0
    dispatches: int = 0
    rows: int = 0
    failovers: int = 0
    no_slot_pairs: int = 0
    fallback_pairs: int = 0
    refused_requests: int = 0
    swap_last_us: float = 0.0
    swap_max_us: float = 0.0
    native: NativeRouterCounts = field(default_factory=NativeRouterCounts)
    shard_rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    shard_pairs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        native = self.native
        self.plan_pack, self.wait, self.combine = (
            Histogram(np.ctypeslib.as_array(words)) for words in (native.plan_pack, native.wait, native.combine)
        )

    @property
    def fan_out_sum(self) -> int:
        """Rows of all messages: for each token the ranks it visited."""
        return int(self.native.fan_out_sum)

    @property
    def bytes_sent(self) -> int:
        """Bytes of requests."""
        return int(self.native.bytes_sent)

    @property
    def bytes_received(self) -> int:
        """Bytes of replies."""
        return int(self.native.bytes_received)

    @property
    def last_success_s(self) -> float | None:
        """When a shard last answered as it should, on time.monotonic(); None for never."""
        return self.native.last_success_ns / 1e9 if self.native.last_success_ns else None

    def add_success(self, now_s: float) -> None:
        """A shard has answered as it should, at `now_s` on time.monotonic()."""
        self.native.last_success_ns = int(now_s * 1e9)

    def resize(self, num_ranks: int) -> None:
        """Make room for the ranks of a new placement; a known rank keeps its counts."""
        missing = num_ranks - len(self.shard_rows)
        if missing > 0:
            self.shard_rows = np.concatenate([self.shard_rows, np.zeros(missing, np.int64)])
            self.shard_pairs = np.concatenate([self.shard_pairs, np.zeros(missing, np.int64)])
        self.num_ranks = num_ranks

    def add_refused_requests(self, count: int) -> None:
        """Count requests that ended for want of experts."""
        self.refused_requests += count

    def add_swap(self, duration_ns: int) -> None:
        """Note how long the step loop stood still for a new epoch."""
        self.swap_last_us = duration_ns / 1000
        self.swap_max_us = max(self.swap_max_us, self.swap_last_us)

    def add_rows(self, rows_R: np.ndarray, pairs_R: np.ndarray) -> None:
        """Count one message to each rank: its rows and its (row, expert) pairs."""
        self.shard_rows[: self.num_ranks] += rows_R
        self.shard_pairs[: self.num_ranks] += pairs_R
        self.native.fan_out_sum += int(rows_R.sum())

    def take_back_rows(self, failed: list[int], rows_R: np.ndarray, pairs_R: np.ndarray) -> None:
        """Uncount the messages to the ranks `failed`: their rows count where they are finally computed."""
        self.shard_rows[failed] -= rows_R[failed]
        self.shard_pairs[failed] -= pairs_R[failed]
        self.native.fan_out_sum -= int(rows_R[failed].sum())

    @property
    def balancedness(self) -> float:
        """Mean rank load over max rank load in pairs, over everything counted so far; 1.0 when that is nothing."""
        pairs = self.shard_pairs[: self.num_ranks]
        return float(pairs.mean() / pairs.max()) if pairs.size and pairs.max() > 0 else 1.0
