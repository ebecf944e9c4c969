"""The placement controller in this process, with a clock of its own: cold start, silence, restarts, what it says."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from cluster.mesh.messages import MembershipAnswer
from tests.support.controller_scene import EXPERTS, LAYERS, SLOTS, Play, Scene, turns
from tests.support.serve.statuses import shard_status


def test_a_cold_start_joins_plans_loads_and_opens(play: Play) -> None:
    async def act(scene: Scene) -> None:
        shards = [scene.shard(f"s{index}", index) for index in range(3)]
        for count, shard in enumerate(shards, 1):
            answer = await shard.join()
            assert (answer.rank, answer.refused, answer.placement) == (None, False, None)
            assert answer.reason == f"{count} of 3 shards are here to plan for" or count == 3
        await turns()
        for rank, shard in enumerate(shards):
            assert await scene.ranks_for("early") is None, "routers wait for every expert"
            answer = await shard.join()
            assert (answer.rank, answer.num_slots, answer.reason) == (rank, SLOTS, "")
            assert answer.times.lost_after_s == 5
            assert shard.held_LE.sum() == LAYERS * EXPERTS / 3
            assert await shard.ready()
        assert await scene.ranks_for("early") == [0, 1, 2]
        status = await scene.controller.status()
        assert (status.complete, status.missing_ranks, status.num_ranks) == (True, [], 3)
        assert (status.migration.target_version, status.migration.origin) == (1, "first")
        assert not status.migration.moving
        assert [seat.state for seat in status.shards] == ["serving"] * 3

    play(act)


def test_a_shard_without_a_seat_is_not_ready(play: Play) -> None:
    async def act(scene: Scene) -> None:
        stranger = scene.shard("stranger", 0)
        stranger.rank = 0
        assert not await stranger.ready()
        assert not (await stranger.ask()).known
        assert not (await scene.controller.heartbeat("stranger", None)).known
        assert await scene.controller.leave("stranger", 1.0), "nothing is left behind"

    play(act)


def test_what_cannot_be_planned_is_refused_with_the_reason(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.restart({"placement": {"min_replicas": 3}})
        shards = [scene.shard(f"s{index}", index) for index in range(3)]
        for shard in shards:
            await shard.join()
        await turns()
        answer = await shards[0].join()
        assert answer.refused
        assert "slots" in answer.reason
        assert (await scene.controller.status()).migration.problem == answer.reason

    play(act)


def test_a_controller_that_stood_still_takes_no_shard_out(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.start()
        await scene.seconds(3, "s0", "s1", "s2")
        before = (await scene.controller.status()).epoch
        scene.now_s += 60
        await scene.seconds(1, "s0", "s1")
        status = await scene.controller.status()
        assert (status.missing_ranks, status.epoch) == ([], before)
        await scene.seconds(3, "s0", "s1")
        assert (await scene.controller.status()).missing_ranks == []
        await scene.seconds(2, "s0", "s1")
        assert (await scene.controller.status()).missing_ranks == [2], "a shard that is gone is found as ever"

    play(act)


def test_a_router_starts_without_a_shard_that_was_lost_after_all_were_there(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.start()
        await scene.seconds(6, "s0", "s1")
        assert await scene.ranks_for("late") == [0, 1]
        status = await scene.controller.status()
        assert not status.complete
        assert status.migration.unserved == LAYERS * EXPERTS / 3

    play(act)


def test_the_others_take_over_when_nobody_replaces_a_shard_in_time(play: Play) -> None:
    async def act(scene: Scene) -> None:
        shards = await scene.start()
        await scene.seconds(20, "s0", "s1")
        assert (await scene.controller.status()).missing_ranks == [2], "five seconds of silence, and 15 of waiting"
        await scene.seconds(6, "s0", "s1")
        await scene.settle()
        status = await scene.controller.status()
        assert (status.complete, status.num_ranks, status.migration.origin) == (True, 2, "shards -2")
        assert (shards[0].held_LE | shards[1].held_LE).all()

    play(act)


def test_a_replacement_joins_empty_and_gets_what_its_predecessor_had(play: Play) -> None:
    async def act(scene: Scene) -> None:
        shards = await scene.start()
        had_LE = shards[1].held_LE.copy()
        await scene.seconds(6, "s0", "s2")
        del scene.shards["s1"]
        new = scene.shard("new", 1)
        answer = await new.join()
        assert (answer.rank, answer.num_slots) == (1, SLOTS)
        assert not new.held_LE.any(), "it serves at once and is filled by copies"
        assert await new.ready()
        assert (await scene.controller.status()).shards[1].state == "filling"
        await scene.settle()
        assert np.array_equal(new.held_LE, had_LE)
        status = await scene.controller.status()
        assert status.complete
        assert [(seat.state, seat.experts_missing) for seat in status.shards] == [("serving", 0)] * 3
        assert status.migration.copies == had_LE.sum()

    play(act)


def test_one_more_shard_takes_its_share(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.start()
        await scene.wants(4)
        new = scene.shard("s3", 3)
        assert (await new.join()).rank == 3
        assert await new.ready()
        await scene.settle(("r",))
        assert new.held_LE.any()
        status = await scene.controller.status()
        assert (status.num_ranks, status.complete, status.migration.origin) == (4, True, "shards +3")

    play(act)


def test_a_long_poll_ends_with_the_next_epoch(play: Play) -> None:
    async def act(scene: Scene) -> None:
        shards = [scene.shard(f"s{index}", index) for index in range(3)]
        for shard in shards:
            await shard.join()
        await turns()
        for shard in shards[:2]:
            await shard.join()
            await shard.ready()
        polls = [asyncio.create_task(scene.poll(name, wait_s=1000.0)) for name in ("one", "two")]
        await turns()
        assert not any(poll.done() for poll in polls)
        await shards[2].join()
        await shards[2].ready()
        for answer in await asyncio.gather(*polls):
            assert answer.membership is not None
            assert (answer.term, answer.membership.epoch, answer.waiting_for) == (scene.term, 3, [])
            assert not answer.membership.placement.partial

    play(act)


def test_a_poll_without_news_names_the_ranks_that_are_missing(play: Play) -> None:
    async def act(scene: Scene) -> None:
        shards = [scene.shard(f"s{index}", index) for index in range(3)]
        for shard in shards:
            await shard.join()
        await turns()
        await shards[1].join()
        await shards[1].ready()
        assert await scene.poll("r") == MembershipAnswer("", None, [0, 2])

    play(act)


def test_a_shard_that_a_router_gave_up_is_tried_again_once_it_was_heard(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.start()
        before = (await scene.controller.status()).epoch
        await scene.poll("r", scene.term, before, {1: "s1"})
        await scene.seconds(4, "s0", "s1", "s2")
        assert (await scene.controller.status()).epoch == before
        await scene.seconds(4, "s0", "s1", "s2")
        assert (await scene.controller.status()).epoch == before + 1

    play(act)


def test_the_status_shows_routers_and_the_last_heartbeat_of_each_shard(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.start()
        await scene.poll("r", scene.term, 1, {1: "s1"})
        mine, stale = shard_status(0, "s0"), shard_status(1, "an-earlier-one")
        for status in (mine, stale):
            assert (await scene.controller.heartbeat(f"s{status.rank}", status)).known
        answer = await scene.controller.heartbeat("stranger", shard_status(0, "s0", requests=99))
        assert not answer.known
        assert answer.epoch == (await scene.controller.status()).epoch
        scene.now_s += 2
        found = await scene.controller.status()
        assert {name: (view.epoch, view.lost, view.silent_s) for name, view in found.routers.items()} == {
            "r": (1, {1: "s1"}, 2)
        }
        assert [(seat.shard_id, seat.rank, seat.serving, seat.silent_s) for seat in found.shards] == [
            (f"s{rank}", rank, True, 2) for rank in range(3)
        ]
        assert [(seat.num_slots, seat.experts_held) for seat in found.shards] == [(SLOTS, 4)] * 3
        assert [seat.status for seat in found.shards] == [mine, None, None], "a predecessor's status is not shown"

    play(act)


def test_silent_routers_are_forgotten_after_a_while(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.poll("r")
        await scene.seconds(49)
        assert list((await scene.controller.status()).routers) == ["r"]
        await scene.seconds(1)
        assert (await scene.controller.status()).routers == {}

    play(act)


def test_the_placement_says_which_experts_each_rank_serves(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.start()
        view = await scene.controller.placement()
        assert (view.epoch, view.target_version) == (3, 1)
        assert view.experts_of_rank == [[[0, 1]] * 2, [[2, 3]] * 2, [[4, 5]] * 2]
        assert view.target is not None
        assert view.placement.num_ranks == view.target.num_ranks == 3

    play(act)


@pytest.mark.parametrize("which", ["_watch", "_serve_watch"])
def test_a_controller_whose_watch_ended_is_unhealthy(play: Play, which: str) -> None:
    async def act(scene: Scene) -> None:
        idle = [asyncio.create_task(asyncio.sleep(60)) for _ in range(2)]
        scene.controller._serve_watch.cancel()
        scene.controller._watch, scene.controller._serve_watch = idle
        await scene.controller.check_health()

        async def fails() -> None:
            raise KeyError("seat")

        setattr(scene.controller, which, asyncio.create_task(fails()))
        await turns()
        with pytest.raises(RuntimeError, match=r"a watch of the controller ended: KeyError\('seat'\)"):
            await scene.controller.check_health()
        for task in idle:
            task.cancel()

    play(act)
