"""What a router reports while the controller wants it, over a controller and a worker that are made up."""

from __future__ import annotations

import asyncio
import zlib
from typing import Any

import pytest

from cluster.autopilot.messages import ObservationReport, ObservationWish
from cluster.controller.client import ControllerLostError
from cluster.router import observations
from cluster.router.observations import report_observations
from cluster.router.worker_calls import EngineSilentError
from tests.support.waiting import run_async

WANTED, UNWANTED = ObservationWish(True, 0.0), ObservationWish(False, 0.0)


class Scene:
    """Gives `wishes` one by one, errors raised; ends the loop after the last. The worker counts its answers."""

    def __init__(self, *wishes: ObservationWish | Exception, silent_at: int = 0) -> None:
        self.wishes, self.silent_at = list(wishes), silent_at
        self.reports: list[tuple[int, bytes]] = []
        self.asked: list[bool] = []  # the worker, whether to go on
        self.observing = False

    async def observe(self, report: ObservationReport, *, timeout_s: float) -> ObservationWish:
        self.reports.append((report.number, zlib.decompress(report.packed) if report.packed else b""))
        if not self.wishes:
            raise asyncio.CancelledError
        wish = self.wishes.pop(0)
        if isinstance(wish, Exception):
            raise wish
        return wish

    async def observation(self, go_on: bool) -> bytes:
        self.asked.append(go_on)
        if len(self.asked) == self.silent_at:
            raise EngineSilentError("no answer")
        told = zlib.compress(b"seen %d" % len(self.asked), 0) if self.observing else b""
        self.observing = go_on
        return told


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observations, "ASK_AGAIN_S", 0.0)


def run(scene: Scene) -> Scene:
    async def check() -> None:
        subject: Any = scene
        with pytest.raises(asyncio.CancelledError):
            await report_observations("r1", subject, subject)

    run_async(asyncio.wait_for(check(), 30))
    return scene


def test_while_nothing_is_wanted_the_worker_is_left_alone() -> None:
    scene = run(Scene(UNWANTED, UNWANTED, UNWANTED))
    assert scene.asked == []
    assert scene.reports == [(1, b""), (2, b""), (3, b""), (4, b"")]


def test_what_was_observed_is_reported_until_nothing_is_wanted_any_more() -> None:
    scene = run(Scene(WANTED, WANTED, UNWANTED, UNWANTED))
    assert scene.asked == [True, True, True, False]
    assert scene.reports == [(1, b""), (2, b"seen 2"), (3, b"seen 3"), (4, b""), (5, b"")]
    assert not scene.observing


def test_a_report_without_an_answer_is_sent_again_under_its_number() -> None:
    scene = run(Scene(WANTED, ControllerLostError("away"), AttributeError("an older one"), WANTED))
    assert scene.reports == [(1, b""), (2, b"seen 2"), (2, b"seen 2"), (2, b"seen 2"), (3, b"seen 3")]


def test_an_engine_that_is_silent_is_asked_again_and_ends_nothing() -> None:
    assert run(Scene(WANTED, WANTED, silent_at=1)).asked == [True, True, True]
    assert run(Scene(WANTED, WANTED, silent_at=2)).reports == [(1, b""), (2, b""), (3, b"seen 3")]
