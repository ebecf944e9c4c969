"""How long the controller lets shards and routers wait, to the instant, and which of it is in its log."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.controller import deployment as controller_module
from tests.support.controller_scene import Play, Scene


class Waits:
    """Takes the place of the controller's waiting: notes how long it would be, and lets as much time pass."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.noted: list[float] = []
        scene.controller._next_change = self  # type: ignore[method-assign, assignment]

    async def __call__(self, timeout_s: float) -> None:
        self.noted.append(timeout_s)
        assert len(self.noted) < 9, "it has to end"
        self.scene.now_s += max(timeout_s, 0.001)


def logged(caplog: pytest.LogCaptureFixture) -> list[Any]:
    return [record.args for record in caplog.records if record.levelno == logging.WARNING]


def test_a_shard_that_leaves_waits_for_all_of_drain_s(play: Play, caplog: pytest.LogCaptureFixture) -> None:
    async def act(scene: Scene) -> None:
        scene.now_s = 2.0  # less than drain_s
        await scene.restart()
        await scene.serve(0, 1, 2)
        await scene.poll("slow", "life", 1)
        waits = Waits(scene)
        assert not await scene.controller.leave("s1")
        assert waits.noted == [pytest.approx(scene.drain_s)]
        assert scene.now_s == pytest.approx(2.0 + scene.drain_s)
        epoch = (await scene.controller.status()).epoch
        assert logged(caplog) == [(["slow"], epoch)]

    play(act)


def test_leaving_that_goes_well_is_no_warning(play: Play, caplog: pytest.LogCaptureFixture) -> None:
    async def act(scene: Scene) -> None:
        await scene.serve(0, 1, 2)
        waits = Waits(scene)
        assert await scene.controller.leave("s1")
        assert await scene.controller.leave("nobody")
        assert waits.noted == []
        assert logged(caplog) == []

    play(act)


@pytest.mark.parametrize("wait_s", [0.0, 4.0])
def test_a_poll_waits_for_all_of_its_time(play: Play, wait_s: float) -> None:
    async def act(scene: Scene) -> None:
        scene.now_s = 3.0
        await scene.restart()
        await scene.serve(0)
        waits = Waits(scene)
        answer = await scene.poll("r", wait_s=wait_s)
        assert (answer.membership, answer.waiting_for) == (None, [1, 2])
        assert waits.noted == ([wait_s] if wait_s else [])

    play(act)


def test_a_wait_ends_with_the_next_change_or_with_its_time(play: Play) -> None:
    async def act(scene: Scene) -> None:
        for timeout_s in (-1.0, 0.0, 0.01):
            await scene.controller._next_change(timeout_s)
        waiting = [asyncio.create_task(scene.controller._next_change(1000.0)) for _ in range(2)]
        await asyncio.sleep(0)
        scene.controller._announce()
        await asyncio.wait_for(asyncio.gather(*waiting), 10)

    play(act)


@pytest.mark.parametrize(("beats", "pause_s", "stood_still"), [(2, 2.0, False), (2, 2.1, True)])
def test_a_pause_of_more_than_two_heartbeats_is_the_controllers_own(
    play: Play, caplog: pytest.LogCaptureFixture, beats: int, pause_s: float, stood_still: bool
) -> None:
    async def act(scene: Scene) -> None:
        await scene.serve(0, 1, 2)
        heartbeat_s = scene.controller._config.membership.heartbeat_s
        await scene.seconds(beats, 0, 1, 2)
        scene.now_s += pause_s * heartbeat_s
        scene.controller._look_for_silence(scene.now_s)
        silent_s = {seat.silent_s for seat in (await scene.controller.status()).shards}
        assert silent_s == {0.0 if stood_still else pause_s * heartbeat_s}
        assert len(logged(caplog)) == stood_still

    play(act)


def test_a_shard_is_taken_out_when_it_was_silent_for_lost_after_s(play: Play, caplog: pytest.LogCaptureFixture) -> None:
    async def act(scene: Scene) -> None:
        await scene.serve(0, 1, 2)
        lost_after_s = scene.controller._config.membership.lost_after_s
        await scene.seconds(int(lost_after_s) - 1, 0, 1)
        assert (await scene.controller.status()).missing_ranks == []
        await scene.seconds(1, 0, 1)
        assert (await scene.controller.status()).missing_ranks == [2]
        assert logged(caplog) == [(2, lost_after_s)]

    play(act)


def test_a_life_of_the_controller_has_a_name_of_its_own(play: Play) -> None:
    async def act(scene: Scene) -> None:
        terms = set()
        for _ in range(3):
            await scene.restart()
            terms.add((await scene.controller.status()).term)
        assert len(terms) == 3
        assert {len(term) for term in terms} == {12}

    play(act)


def test_an_epoch_of_another_life_is_left_behind(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.serve(0, 1, 2)
        status = await scene.controller.status()
        assert status.epoch == 3
        await scene.poll("r", status.term, 7)
        assert (await scene.controller.status()).epoch == 3, "this life gave out no such epoch"
        await scene.poll("r", "another-life", 2)
        assert (await scene.controller.status()).epoch == 3
        await scene.poll("r", "another-life", 3)
        assert (await scene.controller.status()).epoch == 4
        await scene.poll("r", "another-life", 9)
        assert (await scene.controller.status()).epoch == 10

    play(act)


@pytest.mark.parametrize(("epoch", "earlier_life"), [(2, False), (3, True), (9, True)])
def test_a_shard_of_an_epoch_that_all_of_them_made_is_a_sign_of_an_earlier_life(
    play: Play, epoch: int, earlier_life: bool
) -> None:
    async def act(scene: Scene) -> None:
        assert await scene.rejoin(0, epoch)
        await scene.seconds(5, 0)
        assert (await scene.ranks_for("new") == [0]) == earlier_life

    play(act)


def test_the_watch_looks_twice_a_heartbeat(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(scene: Scene) -> None:
        looked, slept = [], []

        async def sleep(seconds: float) -> None:
            slept.append(seconds)
            scene.now_s += seconds
            if len(slept) == 3:
                raise InterruptedError("enough")

        monkeypatch.setattr(controller_module, "asyncio", SimpleNamespace(sleep=sleep))

        def look(now_s: float) -> None:
            looked.append(now_s)
            assert len(looked) < 9, "it looks again and again without sleeping"

        monkeypatch.setattr(scene.controller, "_look_for_silence", look)
        with pytest.raises(InterruptedError):
            await scene.controller._watch_silence()
        half_s = scene.controller._config.membership.heartbeat_s / 2
        assert slept == [half_s] * 3
        assert looked == [1000.0 + half_s, 1000.0 + 2 * half_s]

    play(act)
