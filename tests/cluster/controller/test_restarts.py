"""A further life of the controller: it learns everything from who still serves, and nobody is lost."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.controller_scene import EXPERTS, LAYERS, LIVE, Play, Scene, SceneShard, turns


async def started_and_told(scene: Scene) -> list[SceneShard]:
    """Three shards that serve and have heard of the target."""
    shards = await scene.start()
    for shard in shards:
        await shard.ask()
        assert shard.target is not None
    return shards


def test_routers_start_as_soon_as_all_who_ran_are_back(play: Play) -> None:
    async def act(scene: Scene) -> None:
        shards = await started_and_told(scene)
        await scene.restart(running=3)
        for shard in shards[:2]:
            assert await shard.rejoin(epoch=7) == shard.rank
        await scene.seconds(1)
        assert await scene.ranks_for("new") is None, "rank 2 may be on its way"
        assert await shards[2].rejoin(epoch=7) == 2
        await scene.seconds(1, "s0", "s1", "s2")
        assert await scene.ranks_for("new") == [0, 1, 2]
        status = await scene.controller.status()
        assert status.epoch > 7
        assert (status.migration.target_version, status.migration.origin) == (1, "first"), "no other plan"
        assert (status.migration.moving, status.complete) == (False, True)

    play(act)


@pytest.mark.parametrize("serve_answers", [True, False])
def test_routers_start_once_shards_had_time_to_come_back(play: Play, serve_answers: bool) -> None:
    async def act(scene: Scene) -> None:
        shards = await started_and_told(scene)
        if not serve_answers:
            scene.counts = None
        await scene.restart(running=3)
        for shard in shards[:2]:
            await shard.rejoin(epoch=7)
        await scene.seconds(4, "s0", "s1")
        assert await scene.ranks_for("new") is None
        await scene.seconds(1, "s0", "s1")
        assert await scene.ranks_for("new") == [0, 1]

    play(act)


def test_an_old_router_keeps_what_it_has_until_the_new_life_knows_the_shards(play: Play) -> None:
    async def act(scene: Scene) -> None:
        shards = await started_and_told(scene)
        first = await scene.poll("r")
        assert first.membership is not None
        await scene.restart(running=3)
        assert (await scene.poll("r", first.term, first.membership.epoch)).membership is None
        for shard in shards:
            await shard.rejoin(first.membership.epoch)
        await scene.seconds(1, "s0", "s1", "s2")
        later = await scene.poll("r", first.term, first.membership.epoch)
        assert later.membership is not None
        assert later.term != first.term
        assert later.membership.epoch > first.membership.epoch
        assert later.membership.placement == first.membership.placement

    play(act)


def test_an_epoch_of_another_life_is_left_behind(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.start()
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


def test_a_life_of_the_controller_has_a_name_of_its_own(play: Play) -> None:
    async def act(scene: Scene) -> None:
        terms = set()
        for _ in range(3):
            await scene.restart()
            terms.add(scene.term)
        assert len(terms) == 3
        assert {len(term) for term in terms} == {12}

    play(act)


def test_the_newest_target_that_a_shard_brings_is_worked_towards(play: Play) -> None:
    async def act(scene: Scene) -> None:
        shards = await started_and_told(scene)
        await scene.wants(2)
        await scene.controller.drain(2)
        await shards[0].ask()
        version = (await scene.controller.status()).migration.target_version
        assert version > 1
        await scene.restart(running=3)
        for shard in (shards[1], shards[0], shards[2]):
            await shard.rejoin(epoch=9)
        assert (await scene.controller.status()).migration.target_version == version
        await scene.seconds(1, "s0", "s1", "s2")
        assert (await scene.controller.status()).migration.target_version >= version
        await scene.settle(("r",))
        assert (await scene.controller.status()).complete

    play(act)


def test_a_restart_within_a_migration_loses_no_expert_and_ends_it(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await started_and_told(scene)
        await scene.wants(4)
        new = scene.shard("s3", 3)
        await new.join()
        await new.ready()
        for shard in scene.shards.values():
            await shard.ask()
        scene.counts = type(scene.counts)(4, 4)  # type: ignore[misc]
        await scene.restart(running=4)
        for shard in scene.shards.values():
            assert await shard.rejoin(epoch=20) == shard.rank
        await scene.settle(("r",))
        status = await scene.controller.status()
        assert (status.complete, status.num_ranks) == (True, 4)
        assert new.held_LE.any()

    play(act)


def test_without_a_target_what_is_held_becomes_it(play: Play) -> None:
    async def act(scene: Scene) -> None:
        shards = await scene.start()
        await scene.restart(running=3)
        for shard in shards:
            assert shard.target is None
            await shard.rejoin(epoch=5)
        await scene.seconds(1, "s0", "s1", "s2")
        assert (await scene.controller.status()).migration.target_version >= 1
        await scene.settle(("r",))
        status = await scene.controller.status()
        assert status.complete
        assert [shard.held_LE.sum() for shard in shards] == [LAYERS * EXPERTS / 3] * 3, "nothing had to move"

    play(act)


def test_a_shard_of_another_model_must_restart(play: Play) -> None:
    async def act(scene: Scene) -> None:
        stranger = scene.shard("stranger", 0)
        stranger.rank, stranger.held_LE = 0, np.ones((LAYERS, EXPERTS + 1), np.bool_)
        assert await stranger.rejoin(epoch=5) is None
        assert (await scene.controller.status()).shards == []

    play(act)


def test_two_shards_of_one_rank_both_stay(play: Play) -> None:
    """The one was taken for dead by the earlier life, and its successor has the rank."""

    async def act(scene: Scene) -> None:
        shards = await started_and_told(scene)
        ghost = scene.shard("ghost", 7)
        ghost.rank, ghost.held_LE = 1, shards[1].held_LE.copy()
        await scene.restart(running=4)
        for shard in shards:
            assert await shard.rejoin(epoch=5) == shard.rank
        assert await ghost.rejoin(epoch=5) == 3
        await scene.seconds(1, "s0", "s1", "s2", "ghost")
        assert await scene.ranks_for("new") == [0, 1, 2, 3]

    play(act)


def test_a_shard_that_was_taken_for_dead_comes_back(play: Play) -> None:
    async def act(scene: Scene) -> None:
        shards = await started_and_told(scene)
        await scene.seconds(6, "s0", "s1")
        assert not (await scene.controller.heartbeat("s2", None)).known
        assert not (await shards[2].ask()).known
        assert await shards[2].rejoin(epoch=3) == 2
        status = await scene.controller.status()
        assert (status.complete, status.migration.copies) == (True, 0)

    play(act)


def test_a_shard_that_stops_while_the_controller_restarts_still_hands_on(play: Play) -> None:
    async def act(scene: Scene) -> None:
        shards = await started_and_told(scene)
        await scene.wants(2)
        await scene.restart(running=3)
        for shard in shards[:2]:
            await shard.rejoin(epoch=5)
        await shards[2].rejoin(epoch=5, stopping=True)
        assert (await scene.controller.status()).shards[2].state == "draining"
        await scene.settle(("r",))
        assert (shards[0].held_LE | shards[1].held_LE).all()
        assert not shards[2].held_LE.any()

    play(act)


def test_a_drained_shard_stays_so_and_gets_nothing_back(play: Play) -> None:
    async def act(scene: Scene) -> None:
        shards = await started_and_told(scene)
        assert await scene.controller.drain(2) == ""
        await scene.settle(("r",))
        for shard in shards:
            await shard.heartbeat()
        await scene.restart(running=3)
        for shard in shards:
            await shard.rejoin(epoch=9)
        await scene.settle(("r",))
        assert [seat.state for seat in (await scene.controller.status()).shards] == ["serving", "serving", "draining"]
        assert not shards[2].held_LE.any()
        assert await scene.controller.drain(2, back=True) == ""
        await shards[2].heartbeat()
        assert not shards[2].told.drained

    play(act)


def test_what_was_paused_stays_so_until_it_is_resumed(play: Play) -> None:
    async def act(scene: Scene) -> None:
        shards = await started_and_told(scene)
        await scene.controller.pause(True)
        for shard in shards:
            await shard.heartbeat()
        await scene.restart(running=3)
        for shard in shards:
            await shard.rejoin(epoch=5)
        await scene.seconds(1, "s0", "s1", "s2")
        assert (await scene.controller.status()).migration.paused
        await scene.controller.pause(False)
        assert await shards[0].rejoin(epoch=5) == 0
        assert not (await scene.controller.status()).migration.paused, "a shard that comes late does not pause it again"

    play(act)


def test_a_restart_within_a_cold_start_gives_loading_shards_their_ranks(play: Play) -> None:
    async def act(scene: Scene) -> None:
        shards = [scene.shard(f"s{index}", index) for index in range(3)]
        for shard in shards:
            await shard.join()
        await turns()
        for shard in shards:
            await shard.join()
        assert [shard.rank for shard in shards] == [0, 1, 2]
        await shards[2].ready()
        await scene.restart(running=0)
        assert await shards[2].rejoin(epoch=1) == 2
        for shard in (shards[1], shards[0]):
            await shard.join(loading=shard.rank)
        for shard in shards[:2]:
            assert await shard.ready()
        await scene.seconds(1, "s0", "s1", "s2")
        await scene.settle(("r",))
        status = await scene.controller.status()
        assert (status.complete, [seat.shard_id for seat in status.shards]) == (True, ["s0", "s1", "s2"])

    play(act)


def test_settings_of_the_earlier_life_need_no_new_plan(play: Play) -> None:
    async def act(scene: Scene) -> None:
        shards = await started_and_told(scene)
        await scene.restart(LIVE, running=3)
        for shard in shards:
            await shard.rejoin(epoch=5)
        await scene.seconds(2, "s0", "s1", "s2")
        assert (await scene.controller.status()).migration.target_version == 1
        await scene.restart({**LIVE, "placement": {"min_replicas": 2}}, running=3)
        for shard in shards:
            await shard.rejoin(epoch=9)
        await scene.settle(("r",))
        status = await scene.controller.status()
        assert (status.migration.target_version, status.migration.origin) == (2, "config")

    play(act)
