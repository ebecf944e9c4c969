"""How long the controller lets shards and routers wait, to the instant, and what wakes them."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.controller import deployment as controller_module
from cluster.controller.news import News
from cluster.mesh.messages import MembershipRequest
from placement.placement import Placement
from tests.support.controller_scene import EXPERTS, LAYERS, Play, Scene, turns


class Waits:
    """Takes the place of the controller's waiting: notes how long it would be, and lets as much time pass."""

    def __init__(self, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scene = scene
        self.noted: list[float] = []

        async def next_one(news: News, timeout_s: float) -> None:
            self.wait(timeout_s)

        monkeypatch.setattr(News, "next", next_one)

    def wait(self, timeout_s: float) -> None:
        self.noted.append(timeout_s)
        assert len(self.noted) < 9, "it has to end"
        self.scene.now_s += max(timeout_s, 0.001)


def warnings(caplog: pytest.LogCaptureFixture) -> list[Any]:
    return [record.args for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("wait_s", [0.0, 4.0])
def test_a_routers_poll_waits_for_all_of_its_time(play: Play, monkeypatch: pytest.MonkeyPatch, wait_s: float) -> None:
    async def act(scene: Scene) -> None:
        await scene.start()
        waits = Waits(scene, monkeypatch)
        answer = await scene.poll("r", scene.term, scene.mesh.roster.epoch, wait_s=wait_s)
        assert (answer.membership, answer.waiting_for) == (None, [])
        assert waits.noted == ([wait_s] if wait_s else [])
        silent_s = (await scene.controller.status()).routers["r"].silent_s
        assert silent_s == 0, "it was there all the time"

    play(act)


@pytest.mark.parametrize("wait_s", [0.0, 4.0])
def test_a_shards_poll_waits_for_all_of_its_time(play: Play, monkeypatch: pytest.MonkeyPatch, wait_s: float) -> None:
    async def act(scene: Scene) -> None:
        shard = (await scene.start())[0]
        await shard.ask()
        waits = Waits(scene, monkeypatch)
        answer = await shard.ask(wait_s)
        assert (answer.known, answer.term, answer.order, answer.target) == (True, scene.term, None, None)
        assert waits.noted == ([wait_s] if wait_s else [])

    play(act)


def test_a_shards_poll_ends_with_an_order(play: Play) -> None:
    async def act(scene: Scene) -> None:
        shards = await scene.start()
        for shard in shards:
            assert (await shard.ask()).target is not None
        polls = [asyncio.create_task(shard.ask(1000.0)) for shard in shards]
        await turns()
        assert not any(poll.done() for poll in polls)
        two_of_each = Placement.linear(LAYERS, EXPERTS, 3, 1, 2)
        assert (await scene.controller.apply(two_of_each, False)).accepted
        answers = await asyncio.wait_for(asyncio.gather(*polls), 10)
        assert all(answer.order is not None and answer.order.copy for answer in answers)
        assert {int(answer.target["version"]) for answer in answers if answer.target is not None} == {2}

    play(act)


def test_a_shards_poll_ends_when_its_seat_is_gone(play: Play) -> None:
    async def act(scene: Scene) -> None:
        shards = await scene.start()
        for shard in shards:
            await shard.ask()
        assert (await scene.controller.apply(Placement.linear(LAYERS, EXPERTS, 3, 1, 2), False)).accepted
        await scene.seconds(6, "s0", "s1")
        assert not (await shards[2].ask(1000.0)).known

    play(act)


def test_an_order_is_given_again_until_the_shard_says_that_it_did_it(play: Play) -> None:
    async def act(scene: Scene) -> None:
        shard = (await scene.start())[0]
        await scene.controller.apply(Placement.linear(LAYERS, EXPERTS, 3, 1, 2), False)
        first, again = await shard.ask(), await shard.ask()
        assert first.order == again.order
        assert first.order is not None
        assert again.target is None, "a target is told once"
        shard.term, shard.version = "another-life", 10**6
        assert (await shard.ask()).order == first.order, "versions are of one life"
        shard.version = -1
        assert await shard.work()
        assert (await shard.ask()).order is None

    play(act)


def test_epochs_travel_as_differences_to_what_a_router_has(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.start()
        first = await scene.poll("r")
        assert first.membership is not None
        at = (scene.term, first.membership.epoch)
        await scene.seconds(6, "s0", "s1")
        told = [
            (await scene.controller.await_membership(MembershipRequest("x", *at, {}, 0.0, whole))).told
            for whole in (False, True)
        ]
        assert None not in told
        assert len(told[0]) < len(told[1])
        later = await scene.poll("r", *at)
        stranger = await scene.poll("new")
        assert later.membership is not None
        assert later.membership.placement == scene.mesh.membership.placement
        assert later.membership.epoch == scene.mesh.roster.epoch
        assert stranger.membership == later.membership
        forgetful = type(scene.client)(scene)
        answer = await forgetful.await_membership(MembershipRequest("r", *at, {}, 0.0), timeout_s=5)
        assert answer.membership == later.membership, "a client without the old one asks for the whole"

    play(act)


@pytest.mark.parametrize(("pause_s", "stood_still"), [(2.0, False), (2.1, True)])
def test_a_pause_of_more_than_two_heartbeats_is_the_controllers_own(
    play: Play, caplog: pytest.LogCaptureFixture, pause_s: float, stood_still: bool
) -> None:
    async def act(scene: Scene) -> None:
        await scene.start()
        await scene.seconds(2, "s0", "s1", "s2")
        scene.now_s += pause_s
        scene.controller._look(scene.now_s)
        silent_s = [seat.silent_s for seat in (await scene.controller.status()).shards]
        assert silent_s == pytest.approx([0.0 if stood_still else pause_s] * 3)
        assert len(warnings(caplog)) == stood_still

    play(act)


def test_a_shard_is_taken_out_when_it_was_silent_for_lost_after_s(play: Play, caplog: pytest.LogCaptureFixture) -> None:
    async def act(scene: Scene) -> None:
        await scene.start()
        await scene.seconds(4, "s0", "s1")
        assert (await scene.controller.status()).missing_ranks == []
        await scene.seconds(1, "s0", "s1")
        assert (await scene.controller.status()).missing_ranks == [2]
        assert (2, 5) in warnings(caplog)

    play(act)


def test_the_watch_looks_twice_a_heartbeat(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(scene: Scene) -> None:
        looked, slept = [], []

        async def sleep(seconds: float) -> None:
            slept.append(seconds)
            scene.now_s += seconds
            if len(slept) == 3:
                raise InterruptedError("enough")

        def look(now_s: float) -> None:
            looked.append(now_s)
            assert len(looked) < 9, "it looks again and again without sleeping"

        with monkeypatch.context() as patched:
            patched.setattr(controller_module, "asyncio", SimpleNamespace(sleep=sleep))
            patched.setattr(scene.controller, "_look", look)
            with pytest.raises(InterruptedError):
                await scene.controller._watch_mesh()
        assert slept == [0.5] * 3
        assert looked == [1000.5, 1001.0]

    play(act)


def test_a_wait_ends_with_the_next_wake_up_or_with_its_time() -> None:
    async def act() -> None:
        news = News()
        for timeout_s in (-1.0, 0.0, 0.01):
            await news.next(timeout_s)
        waiting = [asyncio.create_task(news.next(1000.0)) for _ in range(2)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        news.announce()
        await asyncio.wait_for(asyncio.gather(*waiting), 10)
        later = asyncio.create_task(news.next(1000.0))
        await asyncio.sleep(0)
        assert not later.done(), "the next one waits again"
        later.cancel()

    asyncio.run(act())
