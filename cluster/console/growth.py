"""What grew between two looks at the routers, and what that makes of the last seconds. Pure: times are handed in.

R ranks, L layers, E experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.autoscaling.pulse import BOUNDS_S, quantile_s
from cluster.router.messages import RouterLive

SMOOTH_LOOKS = 10  # over which shares, means and percentiles are taken
BUCKETS = len(BOUNDS_S) + 1

FIELDS = (
    *("tokens_per_s", "between_p99_ms", "between_p50_ms", "first_p99_ms", "first_p50_ms"),
    *("fan_out", "balancedness", "running", "waiting", "kv_cache"),
)
"""Of a point of the time lines, after its time. None: not known."""

Point = list[float | None]


@dataclass(frozen=True, eq=False)
class Growth:
    """What all routers together counted between two looks."""

    tokens_per_s: float
    counted: bool  # by the engines; else tokens and times are not known
    rows: int
    visits: int
    between: np.ndarray  # int64 [buckets]
    first: np.ndarray
    pairs_R: np.ndarray  # int64 [R]

    @classmethod
    def of(cls, before: dict[str, tuple[RouterLive, float]], now: Sequence[RouterLive], now_s: float) -> Growth:
        """A router that was not there at the look before has no growth."""
        num_ranks = max((len(each.status.shard_pairs) for each in now), default=0)
        tokens_per_s, rows, visits = 0.0, 0, 0
        between, first = np.zeros(BUCKETS, np.int64), np.zeros(BUCKETS, np.int64)
        pairs_R = np.zeros(num_ranks, np.int64)
        for each in now:
            if each.status.router_id not in before:
                continue
            old, old_s = before[each.status.router_id]
            tokens_per_s += max(each.pulse.tokens - old.pulse.tokens, 0) / max(now_s - old_s, 1e-3)
            rows += each.status.rows - old.status.rows
            visits += each.status.fan_out_sum - old.status.fan_out_sum
            between += np.maximum(_counts(each.pulse.between) - _counts(old.pulse.between), 0)
            first += np.maximum(_counts(each.pulse.first) - _counts(old.pulse.first), 0)
            was_R = np.zeros(num_ranks, np.int64)
            was_R[: len(old.status.shard_pairs)] = old.status.shard_pairs[:num_ranks]
            pairs_R[: len(each.status.shard_pairs)] += np.asarray(each.status.shard_pairs, np.int64)
            pairs_R[: len(each.status.shard_pairs)] -= was_R[: len(each.status.shard_pairs)]
        counted = any(each.pulse.counted for each in now)
        return cls(tokens_per_s, counted, rows, visits, between, first, np.maximum(pairs_R, 0))


def _counts(counts: list[int]) -> np.ndarray:
    return np.asarray(counts, np.int64) if len(counts) == BUCKETS else np.zeros(BUCKETS, np.int64)


def point(at: float, last: Sequence[Growth], now: Sequence[RouterLive]) -> Point:
    """[at, *FIELDS] from the growth of the last looks, newest last. `at` in seconds since 1970."""
    newest, recent = last[-1], last[-SMOOTH_LOOKS:]
    between, first = sum(each.between for each in recent), sum(each.first for each in recent)
    rows = sum(each.rows for each in recent)
    pulses = [each.pulse for each in now]

    def if_counted(value: Callable[[], float | None]) -> float | None:
        return value() if newest.counted else None

    return [
        round(at, 3),
        if_counted(lambda: round(newest.tokens_per_s, 2)),
        if_counted(lambda: _ms(between, 0.99)),
        if_counted(lambda: _ms(between, 0.5)),
        if_counted(lambda: _ms(first, 0.99)),
        if_counted(lambda: _ms(first, 0.5)),
        round(sum(each.visits for each in recent) / rows, 4) if rows else None,
        balancedness(recent),
        if_counted(lambda: sum(pulse.running for pulse in pulses)),
        if_counted(lambda: sum(pulse.waiting for pulse in pulses)),
        if_counted(lambda: round(max((pulse.kv_cache for pulse in pulses), default=0.0), 4)),
    ]


def pairs_by_rank(last: Sequence[Growth]) -> list[int]:
    """Row-expert pairs that each rank got in the last looks."""
    total_R = np.zeros(max((len(each.pairs_R) for each in last), default=0), np.int64)
    for each in last:
        total_R[: len(each.pairs_R)] += each.pairs_R
    return total_R.tolist()


def balancedness(last: Sequence[Growth]) -> float | None:
    """Mean over largest load of the ranks that had any; None without traffic."""
    pairs = [count for count in pairs_by_rank(last) if count]
    return round(sum(pairs) / len(pairs) / max(pairs), 4) if pairs else None


def _ms(counts: Any, share: float) -> float | None:
    seconds = quantile_s(counts, share)
    return None if seconds is None else round(seconds * 1e3, 2)


class Loads:
    """How often each expert was picked in the last `window_s`, from counts of routers that go up."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._last: dict[str, tuple[float, np.ndarray, int]] = {}  # by router: name of its count, counts, tokens
        self._grown: deque[tuple[float, float, np.ndarray, int]] = deque()  # from, to, int64 [L, E], tokens
        self._layers: list[int] = []
        self._before_s: float | None = None

    def add(self, told: dict[str, dict[str, Any]], now_s: float) -> None:
        """What routers said, by id. A count that began anew, or is of another model than the others, adds nothing."""
        grown_LE, tokens, last = None, 0, {}
        for router, loads in told.items():
            shape = (len(loads["layers"]), int(loads["num_experts"]))
            counts_LE = np.frombuffer(loads["counts"], "<i8").reshape(shape)
            last[router] = (loads["since"], counts_LE, int(loads["tokens"]))
            self._layers = list(loads["layers"])
            since, before_LE, before = self._last.get(router, (None, counts_LE, 0))
            if since != loads["since"] or before_LE.shape != shape:
                continue
            grown_LE = counts_LE - before_LE if grown_LE is None else grown_LE + (counts_LE - before_LE)
            tokens += int(loads["tokens"]) - before
        if grown_LE is not None and self._before_s is not None:
            self._grown.append((self._before_s, now_s, grown_LE, tokens))
        self._last, self._before_s = {**self._last, **last}, now_s
        while self._grown and self._grown[0][0] < now_s - self._window_s:
            self._grown.popleft()

    def view(self) -> dict[str, Any] | None:
        """Counts in order of layers and experts, how many tokens and seconds they are of; None before the second."""
        if not self._grown:
            return None
        counts_LE = sum(grown_LE for _, _, grown_LE, _ in self._grown)
        assert isinstance(counts_LE, np.ndarray)
        return {
            "layers": self._layers,
            "num_experts": counts_LE.shape[1],
            "seconds": round(self._grown[-1][1] - self._grown[0][0], 1),
            "tokens": sum(tokens for *_, tokens in self._grown),
            "routers": len(self._last),
            "counts": counts_LE.ravel().tolist(),
        }
