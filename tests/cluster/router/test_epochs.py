"""How a router follows the controller, over a controller and a worker that are made up."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.controller.client import ControllerLostError
from cluster.controller.messages import MembershipAnswer, MembershipRequest
from cluster.router import epochs
from cluster.router.epochs import EpochFollower
from experts.protocol.membership import AppliedMembership, Membership, ShardEndpoint
from placement.placement import Placement
from tests.support.waiting import run_async

PLACEMENT = Placement.linear(1, 3, 3)


def membership(epoch: int, *ranks: int) -> Membership:
    endpoints = (
        ShardEndpoint(rank, f"i{rank}", "127.0.0.1", 1000, "host", 1) if rank in ranks else None for rank in range(3)
    )
    return Membership(epoch, PLACEMENT, tuple(endpoints))


def news(epoch: int, *ranks: int, term: str = "t") -> MembershipAnswer:
    return MembershipAnswer(term, membership(epoch, *ranks), [])


class Controller:
    """Gives its answers in turn, raises those that are errors, and is silent after the last."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.requests: list[MembershipRequest] = []
        self.done = asyncio.Event()

    async def await_membership(self, request: MembershipRequest, timeout_s: float) -> MembershipAnswer:
        assert timeout_s > request.wait_s
        self.requests.append(request)
        if not self.answers:
            self.done.set()
            await asyncio.Event().wait()
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


class Worker:
    """Connects to any shard but those of `slow`; `lost` is what an application of a membership leaves out.

    `refused` are those of the lost that refuse the router.
    """

    def __init__(self) -> None:
        self.slow: list[int] = []
        self.lost: dict[int, str] = {}
        self.refused: list[int] = []
        self.failures: list[Exception] = []
        self.calls: list[tuple[Any, ...]] = []

    async def connect_ahead(self, endpoints: Any) -> list[int]:
        self.calls.append(("connect_ahead", [endpoint.rank for endpoint in endpoints if endpoint is not None]))
        return self.slow

    async def apply_membership(self, found: Membership, wait_s: float | None, connect_s: float) -> AppliedMembership:
        self.calls.append(("apply", found.epoch, wait_s, connect_s))
        if self.failures:
            raise self.failures.pop()
        connected = [e.rank for e in found.endpoints if e is not None and e.rank not in self.lost]
        return AppliedMembership(found.epoch, connected, self.lost, self.refused)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What sleeps goes on at once, but for the bounds on whole tests."""
    sleep = asyncio.sleep
    monkeypatch.setattr(epochs, "asyncio", SimpleNamespace(sleep=lambda _: sleep(0)))


def follower(controller: Any, worker: Any, membership_s: float = 20.0) -> EpochFollower:
    return EpochFollower("r1", controller, worker, SimpleNamespace(connect_s=7.0, membership_s=membership_s))  # type: ignore[arg-type]


def run(coroutine: Any) -> Any:
    return run_async(asyncio.wait_for(coroutine, 30))


async def follow(subject: EpochFollower, controller: Controller) -> None:
    """Until the controller has given all of its answers."""
    task = asyncio.create_task(subject.follow())
    try:
        await controller.done.wait()
        assert not task.done()
    finally:
        task.cancel()


def test_each_epoch_is_connected_ahead_and_applied_without_waiting() -> None:
    async def check() -> None:
        worker, controller = Worker(), Controller(news(4, 0, 1), MembershipAnswer("t", None, [2]), news(5, 0, 1, 2))
        subject = follower(controller, worker)
        await follow(subject, controller)
        assert worker.calls == [
            ("connect_ahead", [0, 1]),
            ("apply", 4, 0.0, 0.0),
            ("connect_ahead", [0, 1, 2]),
            ("apply", 5, 0.0, 0.0),
        ]
        assert [(r.router_id, r.term, r.epoch) for r in controller.requests] == [
            ("r1", "", -1),
            ("r1", "t", 4),
            ("r1", "t", 4),
            ("r1", "t", 5),
        ]
        assert (subject.term, subject.epoch) == ("t", 5)

    run(check())


def test_the_first_epoch_waits_for_connections() -> None:
    async def check() -> None:
        worker, controller = (
            Worker(),
            Controller(MembershipAnswer("", None, [1, 2]), ControllerLostError("away"), news(1, 0)),
        )
        subject = follower(controller, worker)
        await subject.apply_first(await subject.first_membership())
        assert worker.calls == [("apply", 1, None, 7.0)]
        assert (subject.term, subject.epoch) == ("t", 1)

    run(check())


def test_a_poll_names_the_incarnations_of_the_shards_that_were_given_up() -> None:
    async def check() -> None:
        worker, controller = Worker(), Controller(news(4, 0, 1))
        worker.lost = {1: "timed out", 2: "no shard has this rank yet"}
        subject = follower(controller, worker)
        await follow(subject, controller)
        assert [request.lost for request in controller.requests] == [{}, {1: "i1"}]

    run(check())


def test_a_shard_that_refuses_this_router_is_not_reported_as_lost() -> None:
    """The controller would take it out of the mesh for the routers that it does take."""

    async def check() -> None:
        worker, controller = Worker(), Controller(news(4, 0, 1, 2), news(5, 0, 1, 2))
        worker.lost, worker.refused = {0: "timed out", 1: "other weights"}, [1]
        await follow(follower(controller, worker), controller)
        assert [request.lost for request in controller.requests] == [{}, {0: "i0"}, {0: "i0"}]

    run(check())


def test_a_router_that_no_shard_takes_any_more_stops_following() -> None:
    """Its health check names the loop that ended, and why."""

    async def check() -> None:
        worker = Worker()
        worker.lost, worker.refused = {0: "other weights", 1: "timed out"}, [0]
        with pytest.raises(epochs.RefusedError, match=r"no shard takes this router: other weights$"):
            await follower(Controller(news(4, 0, 1)), worker).follow()

    run(check())


def test_a_failure_leaves_the_router_at_its_epoch_and_the_loop_running() -> None:
    async def check() -> None:
        worker, controller = Worker(), Controller(news(4, 0), ControllerLostError("away"), news(5, 0), news(6, 0))
        worker.failures = [ValueError("another model")]
        subject = follower(controller, worker)
        await follow(subject, controller)
        assert [request.epoch for request in controller.requests] == [-1, -1, -1, 5, 6]

    run(check())


def test_a_shard_that_is_slow_to_connect_is_left_for_the_next_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        now_s = iter(range(1000))
        monkeypatch.setattr(epochs, "time", SimpleNamespace(monotonic=lambda: float(next(now_s))))
        worker, controller = Worker(), Controller(news(4, 0, 1))
        worker.slow = [1]
        await follow(follower(controller, worker), controller)
        assert worker.calls == [*[("connect_ahead", [0, 1])] * 2, ("apply", 4, 0.0, 0.0)], "asked for three seconds"

    run(check())


@pytest.mark.parametrize(
    ("answers", "named"),
    [([ControllerLostError("away")] * 9, "all"), ([MembershipAnswer("", None, [1, 2])] * 9, r"\[1, 2\]")],
)
def test_a_router_gives_up_its_start_and_names_the_ranks_that_are_missing(
    answers: list[Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        now_s = iter(range(1000))
        monkeypatch.setattr(epochs, "time", SimpleNamespace(monotonic=lambda: float(next(now_s))))
        await follower(Controller(*answers), Worker(), membership_s=5.0).first_membership()

    with pytest.raises(RuntimeError, match=f"no complete membership within 5.0 s; missing ranks: {named}$"):
        run(check())
