"""The placement controller in this process, with a clock of its own: who is taken out, who may start, what it says."""

from __future__ import annotations

import asyncio

import pytest

from cluster.controller.messages import JoinRequest, MembershipAnswer
from cluster.controller.roster import placement_digest
from placement.placement import Placement
from tests.support.controller_scene import DIGEST, PLACEMENT, Play, Scene, turns
from tests.support.serve.statuses import shard_status


def test_a_controller_that_stood_still_takes_no_shard_out(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.serve(0, 1, 2)
        await scene.seconds(3, 0, 1, 2)
        before = (await scene.controller.status()).epoch
        scene.now_s += 60
        await scene.seconds(1, 0, 1)
        status = await scene.controller.status()
        assert (status.missing_ranks, status.epoch) == ([], before)
        await scene.seconds(3, 0, 1)
        assert (await scene.controller.status()).missing_ranks == []
        await scene.seconds(2, 0, 1)
        assert (await scene.controller.status()).missing_ranks == [2], "a shard that is gone is found as ever"

    play(act)


def test_a_router_starts_without_a_shard_that_was_lost_after_all_were_there(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.serve(0, 1)
        await scene.seconds(30, 0, 1)
        assert await scene.ranks_for("early") is None, "a cold start waits for all shards"
        await scene.serve(2)
        assert await scene.ranks_for("early") == [0, 1, 2]
        await scene.seconds(6, 0, 1)
        assert await scene.ranks_for("late") == [0, 1]

    play(act)


def test_after_a_restart_routers_start_once_shards_had_time_to_come_back(play: Play) -> None:
    async def act(scene: Scene) -> None:
        assert await scene.rejoin(1, epoch=7)
        assert await scene.rejoin(0, epoch=7)
        await scene.seconds(4, 0, 1)
        assert await scene.ranks_for("new") is None, "rank 2 may be on its way"
        await scene.seconds(1, 0, 1)
        assert await scene.ranks_for("new") == [0, 1]

    play(act)


def test_a_router_of_an_earlier_life_says_too_that_all_shards_were_there(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.seconds(5)
        assert await scene.ranks_for("new") is None
        assert await scene.ranks_for("old", "another-life", 7) == []
        assert await scene.ranks_for("new") == []

    play(act)


def test_a_restart_within_a_cold_start_changes_nothing_for_routers(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.serve(0)
        await scene.restart()
        assert await scene.rejoin(0, epoch=1)
        await scene.seconds(30, 0)
        assert await scene.ranks_for("new") is None
        await scene.serve(1, 2)
        assert await scene.ranks_for("new") == [0, 1, 2]

    play(act)


def test_a_shard_that_was_late_in_a_cold_start_is_no_sign_of_an_earlier_life(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.serve(0, 1)
        for _ in range(3):
            epoch = (await scene.controller.status()).epoch
            await scene.seconds(6, 1)
            assert await scene.rejoin(0, epoch)
        assert await scene.ranks_for("new") is None

    play(act)


def test_a_shard_that_holds_another_placement_gets_no_seat(play: Play) -> None:
    async def act(scene: Scene) -> None:
        assert not await scene.rejoin(1, epoch=7, digest=placement_digest(Placement.linear(2, 6, 3, 3)))
        status = await scene.controller.status()
        assert (status.shards, status.epoch) == ([], 0), "nothing of it is kept"
        assert await scene.rejoin(1, epoch=7)
        assert (await scene.controller.status()).epoch > 7

    play(act)


def test_a_long_poll_ends_with_the_next_epoch(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.serve(0, 1)
        polls = [asyncio.create_task(scene.poll(name, wait_s=1000.0)) for name in ("one", "two")]
        await turns()
        assert not any(poll.done() for poll in polls)
        await scene.serve(2)
        answers = await asyncio.gather(*polls)
        term = (await scene.controller.status()).term
        for answer in answers:
            assert answer.membership is not None
            assert (answer.term, answer.membership.epoch, answer.waiting_for) == (term, 3, [])
            assert answer.membership.placement == PLACEMENT

    play(act)


def test_a_poll_without_news_names_the_ranks_that_are_missing(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.serve(1)
        assert await scene.poll("r") == MembershipAnswer("", None, [0, 2])

    play(act)


def test_a_shard_without_a_rank_hears_why(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.serve(0, 1, 2)
        answer = await scene.controller.join(JoinRequest("late", "n", 1))
        assert (answer.rank, answer.placement, answer.epoch) == (None, None, 3)
        assert answer.reason == "all 3 ranks are taken"
        assert (await scene.controller.join(JoinRequest("s1", "n", 1))).placement == PLACEMENT

    play(act)


def test_a_shard_that_a_router_gave_up_is_tried_again_once_it_was_heard(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.serve(0, 1, 2)
        await scene.poll("r", "life", 3, {1: "a1"})
        before = (await scene.controller.status()).epoch
        await scene.seconds(60, 0, 1, 2)
        assert (await scene.controller.status()).epoch > before

    play(act)


def test_the_status_shows_routers_and_the_last_heartbeat_of_each_shard(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.serve(0, 1)
        await scene.poll("r", "life", 1, {1: "a1"})
        mine, stale = shard_status(0, "a0"), shard_status(1, "an-earlier-one")
        for status in (mine, stale):
            assert (await scene.controller.heartbeat(f"s{status.rank}", status)).known
        answer = await scene.controller.heartbeat("stranger", shard_status(0, "a0", requests=99))
        assert not answer.known
        assert answer.epoch == (await scene.controller.status()).epoch
        scene.now_s += 2
        found = await scene.controller.status()
        assert (found.complete, found.missing_ranks, found.num_ranks) == (False, [2], 3)
        assert found.placement_digest == DIGEST
        assert {name: (view.epoch, view.lost, view.silent_s) for name, view in found.routers.items()} == {
            "r": (1, {1: "a1"}, 2)
        }
        assert [(seat.shard_id, seat.rank, seat.serving, seat.silent_s) for seat in found.shards] == [
            ("s0", 0, True, 2),
            ("s1", 1, True, 2),
        ]
        assert [seat.status for seat in found.shards] == [mine, None], "a predecessor's status is not shown"

    play(act)


def test_silent_routers_are_forgotten_after_a_while(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.poll("r")
        await scene.seconds(49)
        assert list((await scene.controller.status()).routers) == ["r"]
        await scene.seconds(1)
        assert (await scene.controller.status()).routers == {}

    play(act)


def test_the_placement_says_which_experts_each_rank_holds(play: Play) -> None:
    async def act(scene: Scene) -> None:
        view = await scene.controller.placement()
        assert (view.epoch, view.digest, view.placement) == (0, DIGEST, PLACEMENT)
        assert view.experts_of_rank == [[[0, 1]] * 2, [[2, 3]] * 2, [[4, 5]] * 2]

    play(act)


def test_a_controller_whose_watch_ended_is_unhealthy(play: Play) -> None:
    async def act(scene: Scene) -> None:
        scene.controller._watch = asyncio.create_task(asyncio.sleep(60))
        await scene.controller.check_health()
        scene.controller._watch.cancel()

        async def fails() -> None:
            raise KeyError("seat")

        scene.controller._watch = asyncio.create_task(fails())
        await turns()
        with pytest.raises(RuntimeError, match=r"the watch over shards ended: KeyError\('seat'\)"):
            await scene.controller.check_health()

    play(act)
