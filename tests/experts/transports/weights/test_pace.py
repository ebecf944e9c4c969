"""The limit on bytes a second, on a clock that the test moves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from experts.transports.weights import pace as pace_module
from experts.transports.weights.pace import CopyCancelledError, Pace
from experts.transports.weights.ring import CHUNK_BYTES
from experts.transports.weights.staging import PIECE_BYTES


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(pace_module, "time", SimpleNamespace(monotonic=lambda: self.now_s, sleep=self.sleep))

    def sleep(self, seconds: float) -> None:
        assert 0 < seconds <= 0.05, "it must notice in time that it was called off"
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize("sizes", [[1000] * 10, [5000, 1000, 4000], [1, 9999]])
def test_bytes_come_no_faster_than_the_limit(clock: Clock, sizes: list[int]) -> None:
    pace = Pace(1000.0, lambda: False)
    for nbytes in sizes:
        pace.take(nbytes)
    # The first piece comes at once, each other one when those before it have had their time.
    assert clock.now_s - 100.0 == pytest.approx(sum(sizes[:-1]) / 1000.0)


def test_time_without_copies_is_not_saved_up(clock: Clock) -> None:
    pace = Pace(1000.0, lambda: False)
    pace.take(1000)
    clock.now_s += 3600.0
    before_s = clock.now_s
    for _ in range(5):
        pace.take(1000)
    assert clock.now_s - before_s == pytest.approx(4.0)


def test_without_a_limit_nothing_waits(clock: Clock) -> None:
    pace = Pace(None, lambda: False)
    pace.take(1 << 50)
    assert clock.now_s == 100.0
    assert pace.piece_bytes == PIECE_BYTES


@pytest.mark.parametrize(("rate", "expected"), [(1.0, 1), (100e6, 4), (1e9, 32), (1e12, 32)])
def test_pieces_are_small_at_a_low_rate(rate: float, expected: int) -> None:
    assert Pace(rate, lambda: False).piece_bytes == expected * CHUNK_BYTES


def test_a_wait_ends_when_the_copy_is_called_off(clock: Clock) -> None:
    pace = Pace(1.0, lambda: clock.now_s > 101.0)
    pace.take(1000)
    with pytest.raises(CopyCancelledError, match="cancelled"):
        pace.take(1)
    assert clock.now_s < 101.2


@pytest.mark.parametrize("rate", [0.0, -5.0, float("nan")])
def test_a_limit_that_lets_nothing_through_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="expected more than 0, or None for no limit"):
        Pace(rate, lambda: False)
