"""How a router follows the controller, over a controller and a worker that are made up."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.controller.client import ControllerLostError
from cluster.mesh.messages import MembershipAnswer, MembershipRequest
from cluster.router import epochs
from cluster.router.epochs import EpochFollower
from experts.protocol.membership import AppliedMembership, Membership, Preparation, ShardEndpoint
from experts.protocol.membership_bytes import UnknownEpochError, epochs_in
from experts.protocol.secret import MeshSecret
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
        self.secret = MeshSecret.generate()
        self.brought: list[MeshSecret | None] = []

    async def mesh_secret(self, held: MeshSecret | None, *, timeout_s: float) -> MeshSecret:
        self.brought.append(held)
        return self.secret

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
    """Prepares epochs as its `states` say, then at once; `lost` is what an epoch leaves out.

    `refused` are those of the lost that refuse the router. It knows the epoch in use, as a real one does.
    """

    timeout_s = 10.0

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []
        self.lost: dict[int, str] = {}
        self.refused: list[int] = []
        self.failures: list[Exception] = []
        self.calls: list[tuple[Any, ...]] = []
        self.in_use: Membership | None = None
        self.told: Membership | None = None
        self.secrets: list[MeshSecret] = []

    async def use_secret(self, secret: MeshSecret) -> None:
        assert self.told is None or self.told is self.in_use, "before it connects anywhere"
        self.secrets.append(secret)

    async def prepare(self, told: bytes, connect_s: float | None) -> Preparation:
        epoch, base = epochs_in(told)
        self.calls.append(("prepare", epoch, base, connect_s))
        if self.failures:
            raise self.failures.pop()
        try:
            self.told = Membership.from_bytes(told, self.in_use)
        except UnknownEpochError as error:
            return Preparation(epoch, False, [], True, str(error))
        return await self.preparation()

    async def preparation(self) -> Preparation:
        assert self.told is not None
        state = Preparation(self.told.epoch, True, [], False, "")
        return replace(state, ready=False, **self.states.pop(0)) if self.states else state

    async def apply(self, epoch: int) -> AppliedMembership:
        assert self.told is not None
        assert self.told.epoch == epoch
        self.calls.append(("apply", epoch))
        self.in_use = self.told
        connected = [e.rank for e in self.told.endpoints if e is not None and e.rank not in self.lost]
        return AppliedMembership(epoch, connected, self.lost, self.refused)


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


def test_each_epoch_is_prepared_and_then_applied() -> None:
    async def check() -> None:
        worker, controller = Worker(), Controller(news(4, 0, 1), MembershipAnswer("t", None, [2]), news(5, 0, 1, 2))
        subject = follower(controller, worker)
        await follow(subject, controller)
        assert worker.calls == [
            ("prepare", 4, -1, epochs.CONNECT_AHEAD_S),
            ("apply", 4),
            ("prepare", 5, 4, epochs.CONNECT_AHEAD_S),
            ("apply", 5),
        ], "the second is told as a difference from the first"
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
        assert worker.calls == [("prepare", 1, -1, None), ("apply", 1)]
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
        worker.lost, worker.refused = dict.fromkeys(range(3), "other weights"), [0, 1, 2]
        with pytest.raises(epochs.RefusedError, match=r"no shard takes this router: other weights$"):
            await follower(Controller(news(4, 0, 1, 2)), worker).follow()

    run(check())


def test_a_router_whose_right_shards_are_merely_away_goes_on() -> None:
    """It computes what they held, though the one shard that answers is of another model. A starting router gives up."""

    async def check() -> None:
        worker, controller = Worker(), Controller(news(4, 0, 1))
        worker.lost, worker.refused = {0: "other weights", 1: "timed out", 2: "no shard has this rank yet"}, [0]
        await follow(follower(controller, worker), controller)
        with pytest.raises(epochs.RefusedError, match=r"no shard takes this router: other weights$"):
            await follower(Controller(), worker).apply_first(news(4, 0, 1))

    run(check())


def test_an_epoch_that_is_overtaken_while_a_shard_connects_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        now_s = iter(range(1000))
        monkeypatch.setattr(epochs, "time", SimpleNamespace(monotonic=lambda: float(next(now_s))))
        worker, controller = Worker(), Controller(news(4, 0, 1), news(4, 0, 1), ControllerLostError("away"), news(7, 0))
        worker.states = [{"connecting": [1]}] * 3
        subject = follower(controller, worker)
        await follow(subject, controller)
        assert [call[:2] for call in worker.calls] == [("prepare", 4), ("prepare", 7), ("apply", 7)]
        assert [(request.epoch, request.wait_s) for request in controller.requests] == [
            (-1, epochs.LONG_POLL_S),
            *[(-1, 0.0)] * 3,
            (7, epochs.LONG_POLL_S),
        ]

    run(check())


def test_a_worker_that_lost_its_epoch_is_told_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        worker, controller = Worker(), Controller(news(4, 0, 1), news(5, 0, 1), news(6, 0))
        subject = follower(controller, worker)
        apply = worker.apply

        async def forget(epoch: int) -> AppliedMembership:
            applied = await apply(epoch)
            if epoch == 4:
                worker.in_use = None
            return applied

        monkeypatch.setattr(worker, "apply", forget)
        await follow(subject, controller)
        prepared = [call[1:3] for call in worker.calls if call[0] == "prepare"]
        assert prepared == [(4, -1), (5, 4), (5, -1), (6, 5)]
        assert worker.in_use == membership(6, 0)

    run(check())


def test_an_epoch_that_never_gets_ready_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        now_s = iter(range(1000))
        monkeypatch.setattr(epochs, "time", SimpleNamespace(monotonic=lambda: float(next(now_s))))
        worker, controller = Worker(), Controller(news(4, 0), news(5, 0))
        worker.states = [{}] * 13  # more than three seconds to connect and ten for a call
        await follow(follower(controller, worker), controller)
        assert [call[:2] for call in worker.calls] == [("prepare", 4), ("prepare", 5), ("apply", 5)]

    run(check())


def test_a_failure_leaves_the_router_at_its_epoch_and_the_loop_running() -> None:
    async def check() -> None:
        worker, controller = Worker(), Controller(news(4, 0), ControllerLostError("away"), news(5, 0), news(6, 0))
        worker.failures = [ValueError("another model")]
        subject = follower(controller, worker)
        await follow(subject, controller)
        assert [request.epoch for request in controller.requests] == [-1, -1, -1, 5, 6]

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


def test_the_secret_comes_before_the_first_epoch_and_from_each_life_of_the_controller() -> None:
    controller, worker = Controller(news(2, 0), news(3, 0, term="t2"), news(4, 0, term="t2")), Worker()
    one = follower(controller, worker)

    async def whole() -> None:
        await one.apply_first(await one.first_membership())
        following = asyncio.create_task(one.follow())
        await controller.done.wait()
        following.cancel()

    run(whole())
    assert worker.secrets == [controller.secret]
    assert controller.brought == [None, controller.secret], "a restarted controller may not know it"
    assert one.epoch == 4
