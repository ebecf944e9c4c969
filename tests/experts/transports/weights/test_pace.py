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


class Thread:
    """What Linux says of the copying thread: seconds used, cores taken away; and the shard's answered requests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ru_utime, self.ru_stime, self.ru_nivcsw, self.requests = 3.0, 1.0, 5, 100
        made_up = SimpleNamespace(getrusage=lambda who: self, RUSAGE_THREAD=1)
        monkeypatch.setattr(pace_module, "resource", made_up)


@pytest.mark.parametrize(("requests", "taken_away"), [(0, 0), (1, 0), (0, 1)])
def test_copies_go_on_at_full_speed_without_requests_or_with_cores_to_spare(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, requests: int, taken_away: int
) -> None:
    thread = Thread(monkeypatch)
    pace = Pace(None, lambda: False, lambda: thread.requests)
    for _ in range(20):
        pace.take(PIECE_BYTES)
        thread.ru_utime += 0.001
        thread.requests += requests
        thread.ru_nivcsw += taken_away
    assert clock.now_s == 100.0
    assert pace.piece_bytes == PIECE_BYTES


def test_copies_use_a_share_of_a_core_while_requests_come_and_cores_are_short(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    thread = Thread(monkeypatch)
    pace = Pace(None, lambda: False, lambda: thread.requests)
    pace.take(PIECE_BYTES)
    used_s = 0.0
    for number in range(50):
        thread.ru_utime += 0.001
        thread.ru_stime += 0.001
        clock.now_s += 0.002
        used_s += 0.002
        thread.requests += 1
        thread.ru_nivcsw += number % 10 == 0  # a thread that sleeps a lot is seldom interrupted
        pace.take(PIECE_BYTES)
    assert used_s / (clock.now_s - 100.0) == pytest.approx(pace_module.SHARE)
    assert CHUNK_BYTES <= pace.piece_bytes < PIECE_BYTES
    clock.now_s += 1.1
    thread.ru_nivcsw += 1
    before_s = clock.now_s
    for _ in range(20):
        thread.ru_utime += 0.001
        pace.take(PIECE_BYTES)
    assert clock.now_s == before_s, "no requests come any more"
    assert pace.piece_bytes == PIECE_BYTES
