"""A shard that leaves: held until nobody sends to it, and no longer."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.controller_scene import Play, Scene, turns


def test_a_shard_that_leaves_is_held_until_every_router_goes_on_without_it(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.serve(0, 1, 2)
        first = await scene.poll("one")
        assert first.membership is not None
        epoch = first.membership.epoch
        for router in ("one", "two"):
            await scene.poll(router, first.term, epoch)
        leaving = asyncio.create_task(scene.controller.leave("s1"))
        await turns()
        assert not leaving.done()
        later = await scene.poll("one", first.term, epoch)
        assert later.membership is not None
        assert later.membership.endpoints[1] is None
        await scene.poll("one", first.term, later.membership.epoch)
        await turns()
        assert not leaving.done(), "the other router still sends to it"
        await scene.poll("two", first.term, later.membership.epoch)
        assert await leaving

    play(act)


def test_a_shard_that_leaves_is_held_no_longer_than_drain_s(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.serve(0, 1, 2)
        first = await scene.poll("slow")
        assert first.membership is not None
        leaving = asyncio.create_task(scene.controller.leave("s1"))
        await turns()
        scene.now_s += scene.drain_s - 0.1
        await scene.poll("slow", first.term, first.membership.epoch - 1)
        await turns()
        assert not leaving.done()
        scene.now_s += 0.2
        await scene.poll("slow", first.term, first.membership.epoch - 1)
        assert not await leaving, "the router has not moved"

    play(act)


@pytest.mark.parametrize("how", ["stops", "falls silent"])
def test_nobody_waits_for_a_router_that_is_gone(play: Play, how: str) -> None:
    async def act(scene: Scene) -> None:
        await scene.serve(0, 1, 2)
        first = await scene.poll("gone")
        assert first.membership is not None
        if how == "falls silent":
            await scene.seconds(5, 0, 1, 2)
        leaving = asyncio.create_task(scene.controller.leave("s1"))
        if how == "stops":
            await turns()
            assert not leaving.done()
            await scene.controller.deregister_router("gone")
        await turns()
        assert leaving.done()
        assert leaving.result()

    play(act)
