"""How a shard follows orders: one after the other, release before copy, and every result is told once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.controller.client import ControllerLostError
from cluster.mesh.messages import CopyReport, OrderAnswer, OrderRequest, ShardOrder
from cluster.shard import orders as orders_module
from cluster.shard.orders import OrderFollower
from experts.protocol.orders import CopyOrder, CopyResult
from placement.placement import Placement
from tests.support.fake_shard_server import FakeShardServer
from tests.support.waiting import run_async


class Controller:
    """Gives out `answers` one by one, then nothing; hears reports, or loses those whose turn is in `lost`."""

    def __init__(self) -> None:
        self.answers: list[OrderAnswer | Exception] = []
        self.asked: list[OrderRequest] = []
        self.reports: list[CopyReport] = []
        self.lost: set[int] = set()
        self.tries = 0

    def order(self, version: int, release: Any = (), copy: Any = (), target: dict[str, Any] | None = None) -> None:
        order = ShardOrder(version, tuple(release), tuple(CopyOrder(*pair) for pair in copy), 7.0)
        self.answers.append(OrderAnswer(True, "life", order, target))

    async def await_order(self, request: OrderRequest, *, timeout_s: float) -> OrderAnswer:
        if request.report is not None:
            await self.report(request.report, timeout_s=timeout_s)
        self.asked.append(request)
        await asyncio.sleep(0)
        if not self.answers:
            await asyncio.Event().wait()
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def report(self, report: CopyReport, *, timeout_s: float) -> bool:
        self.tries += 1
        if self.tries in self.lost:
            raise ControllerLostError("no answer to report")
        self.reports.append(report)
        return True

    @property
    def results(self) -> list[tuple[int, int]]:
        return [(result.layer, result.expert) for report in self.reports for result in report.results]


class Scene:
    """A shard of four experts in two layers with three slots, which starts with expert 0 of each."""

    def __init__(self) -> None:
        self.controller = Controller()
        self.server = FakeShardServer(SimpleNamespace(slots_per_rank=3))
        self.server.may_listen.set()
        self.server.start(Placement(1, 1, 4, np.array([[0], [0]], np.int32), partial=True), 0, 0)
        self.server.done.clear()
        self.follower = OrderFollower("s", 4, self.server, self.controller)  # type: ignore[arg-type]

    async def until(self, condition: Callable[[], Any]) -> None:
        """The whole scene has a deadline."""
        while not condition():
            await asyncio.sleep(0.001)


Follow = Callable[[Callable[[Scene], Awaitable[None]]], None]


@pytest.fixture
def follow(monkeypatch: pytest.MonkeyPatch) -> Follow:
    """Runs one scene with a follower."""
    monkeypatch.setattr(orders_module, "PAUSE_S", 0.001)
    monkeypatch.setattr(orders_module, "REPORT_EVERY_S", 0.005)

    def run(act: Callable[[Scene], Awaitable[None]]) -> None:
        async def whole() -> None:
            scene = Scene()
            following = asyncio.create_task(scene.follower.follow())
            try:
                await act(scene)
                assert not following.done()
            finally:
                scene.server.may_copy.set()
                following.cancel()

        run_async(whole(), "the scene to end")

    return run


def test_an_order_is_carried_out_release_first_and_reported(follow: Follow) -> None:
    async def act(scene: Scene) -> None:
        scene.controller.order(4, [(0, 0)], [(0, 2), (1, 3)])
        await scene.until(lambda: len(scene.controller.asked) == 2)
        assert scene.server.done == [("release", 0, 0), ("copy", 0, 2, 7.0), ("copy", 1, 3, 7.0)]
        assert scene.controller.results == [(0, 2), (1, 3)]
        held_LE = scene.controller.reports[-1].held_LE
        assert np.argwhere(held_LE).tolist() == [[0, 2], [1, 0], [1, 3]]
        first, second = scene.controller.asked
        assert (first.term, first.version, first.target_version) == ("", -1, -1)
        assert (second.term, second.version) == ("life", 4)

    follow(act)


def test_orders_follow_one_another(follow: Follow) -> None:
    async def act(scene: Scene) -> None:
        scene.controller.order(1, [], [(0, 1)])
        scene.controller.order(2, [(0, 1)])
        scene.controller.order(5, [], [(0, 2)])
        await scene.until(lambda: len(scene.controller.asked) == 4)
        assert scene.server.done == [("copy", 0, 1, 7.0), ("release", 0, 1), ("copy", 0, 2, 7.0)]
        assert [request.version for request in scene.controller.asked] == [-1, 1, 2, 5]
        assert scene.controller.results == [(0, 1), (0, 2)]

    follow(act)


def test_a_release_alone_is_reported(follow: Follow) -> None:
    async def act(scene: Scene) -> None:
        scene.controller.order(1, [(1, 0)])
        await scene.until(lambda: len(scene.controller.asked) == 2)
        assert [np.argwhere(report.held_LE).tolist() for report in scene.controller.reports] == [[[0, 0]]]

    follow(act)


@pytest.mark.parametrize("lost", [{1}, {1, 2}, {2}])
def test_a_result_is_told_once_also_if_reports_are_lost(follow: Follow, lost: set[int]) -> None:
    async def act(scene: Scene) -> None:
        scene.controller.lost = lost
        for version, expert in enumerate((1, 2, 3)):
            scene.controller.order(version, [(0, expert - 1)], [(0, expert)])
        await scene.until(lambda: len(scene.controller.asked) == 4)
        assert sorted(scene.controller.results) == [(0, 1), (0, 2), (0, 3)]

    follow(act)


def test_what_is_there_is_told_while_further_copies_are_made(follow: Follow) -> None:
    async def act(scene: Scene) -> None:
        scene.server.may_copy.clear()
        scene.controller.order(1, [], [(0, 1)])
        await scene.until(lambda: len(scene.controller.asked) == 1)
        scene.follower._done(CopyResult(1, 1, "shm", 10, 0.1))
        await scene.until(lambda: scene.controller.results)
        assert len(scene.controller.asked) == 1, "the order is not done yet"
        scene.server.may_copy.set()
        await scene.until(lambda: len(scene.controller.asked) == 2)
        assert scene.controller.results == [(1, 1), (0, 1)]

    follow(act)


def test_a_copy_thread_that_fails_is_logged_and_the_next_order_follows(
    follow: Follow, caplog: pytest.LogCaptureFixture
) -> None:
    async def act(scene: Scene) -> None:
        scene.server.failing = MemoryError("no room")
        scene.controller.order(1, [(0, 0)], [(0, 1)])
        scene.controller.order(2, [], [(0, 2)])
        await scene.until(lambda: len(scene.controller.asked) == 3)
        assert scene.server.done == [("release", 0, 0), ("copy", 0, 2, 7.0)]
        assert np.argwhere(scene.controller.reports[0].held_LE).tolist() == [[1, 0]], "what it holds is told"
        assert "an order failed" in caplog.text
        assert "no room" in caplog.text

    follow(act)


def test_the_newest_target_is_kept_for_the_next_life_of_the_controller(follow: Follow) -> None:
    async def act(scene: Scene) -> None:
        scene.controller.answers.append(OrderAnswer(True, "life", None, {"version": 4, "x": 1}))
        scene.controller.answers.append(OrderAnswer(True, "life", None, None))
        scene.controller.order(1, target={"version": 6})
        await scene.until(lambda: len(scene.controller.asked) == 4)
        assert [request.target_version for request in scene.controller.asked] == [-1, 4, 4, 6]
        assert scene.follower.target == {"version": 6}

    follow(act)


def test_it_asks_on_while_the_controller_is_away_or_does_not_know_it(
    follow: Follow, caplog: pytest.LogCaptureFixture
) -> None:
    async def act(scene: Scene) -> None:
        scene.controller.answers.append(ControllerLostError("no answer to await_order"))
        scene.controller.answers.append(OrderAnswer(False, "another", None, None))
        scene.controller.order(1, [], [(0, 1)])
        await scene.until(lambda: len(scene.controller.asked) == 4)
        assert scene.controller.asked[2].term == "", "a controller that does not know it has no orders of its own"
        assert scene.controller.results == [(0, 1)]
        assert [record.levelno for record in caplog.records] == [logging.WARNING]

    follow(act)


def test_another_life_of_the_controller_numbers_its_orders_anew(follow: Follow) -> None:
    """Its first answer may bring no order: the last version of the life before must not outlive that."""

    async def act(scene: Scene) -> None:
        scene.controller.order(7, [], [(0, 1)])
        scene.controller.answers.append(OrderAnswer(True, "next life", None, None))
        scene.controller.answers.append(OrderAnswer(True, "next life", None, None))
        await scene.until(lambda: len(scene.controller.asked) == 4)
        asked = [(request.term, request.version) for request in scene.controller.asked]
        assert asked == [("", -1), ("life", 7), ("next life", -1), ("next life", -1)]

    follow(act)


def test_cancelling_ends_the_copies_at_hand(follow: Follow) -> None:
    async def act(scene: Scene) -> None:
        scene.server.may_copy.clear()
        scene.controller.order(1, [], [(0, 1), (0, 2)])
        await scene.until(lambda: len(scene.controller.asked) == 1)
        scene.follower.cancel()
        scene.server.may_copy.set()
        await scene.until(lambda: len(scene.controller.asked) == 2)
        assert scene.server.done == []

    follow(act)
