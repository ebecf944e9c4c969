"""A shard that leaves: held until the others have what only it had and nobody sends to it, and no longer."""

from __future__ import annotations

import asyncio

import pytest

from cluster.ray_joints import ReplicaCounts
from tests.support.controller_scene import Play, Scene, turns
from tests.support.serve.statuses import shard_status


async def leaving(scene: Scene, name: str, timeout_s: float = 1000.0) -> asyncio.Task[bool]:
    task = asyncio.create_task(scene.controller.leave(name, timeout_s))
    await turns()
    return task


def test_a_shard_that_leaves_is_held_until_the_others_have_its_experts(play: Play) -> None:
    async def act(scene: Scene) -> None:
        shards = await scene.start()
        await scene.wants(2)
        task = await leaving(scene, "s2")
        assert not task.done()
        assert (await scene.controller.status()).shards[2].state == "draining"
        for _ in range(20):
            for shard in shards:
                await shard.work()
            await turns()
        await asyncio.wait_for(task, 10)
        assert task.result()
        assert (shards[0].held_LE | shards[1].held_LE).all()
        status = await scene.controller.status()
        assert (status.complete, [seat.shard_id for seat in status.shards]) == (True, ["s0", "s1"])

    play(act)


def test_serve_is_asked_how_many_shards_it_wants_after_one_has_left(play: Play) -> None:
    """The autopilot waits for as many as Serve wants."""

    async def act(scene: Scene) -> None:
        shards = await scene.start()
        scene.counts = ReplicaCounts(2, 0)
        task = await leaving(scene, "s2")
        for _ in range(20):
            for shard in shards:
                await shard.work()
            await turns()
        await asyncio.wait_for(task, 10)
        await scene.ask_serve()
        assert scene.mesh.wanted == 2
        asked = scene.asked_serve
        await scene.ask_serve()
        assert scene.asked_serve == asked, "as many serve"

    play(act)


def test_it_is_held_until_every_router_goes_on_without_it(play: Play) -> None:
    async def act(scene: Scene) -> None:
        shards = await scene.start()
        await scene.wants(2)
        epoch = scene.mesh.roster.epoch
        for router in ("one", "two"):
            await scene.poll(router, scene.term, epoch)
        task = await leaving(scene, "s2")
        for _ in range(20):
            for shard in shards:
                await shard.work()
            await turns()
        assert scene.mesh.handed_over(2)
        await asyncio.sleep(0.25)
        assert not task.done(), "both routers still send to it"
        await scene.poll("one", scene.term, scene.mesh.roster.epoch)
        await scene.poll("two", scene.term, epoch)
        await asyncio.sleep(0.25)
        assert not task.done(), "one still does"
        await scene.poll("two", scene.term, scene.mesh.roster.epoch)
        for router in ("one", "two"):  # the epoch without its seat
            await asyncio.sleep(0.25)
            await scene.poll(router, scene.term, scene.mesh.roster.epoch)
        assert await asyncio.wait_for(task, 10)

    play(act)


@pytest.mark.parametrize("how", ["stops", "falls silent"])
def test_nobody_waits_for_a_router_that_is_gone(play: Play, how: str) -> None:
    async def act(scene: Scene) -> None:
        shards = await scene.start()
        await scene.wants(2)
        await scene.poll("gone", scene.term, scene.mesh.roster.epoch)
        if how == "falls silent":
            await scene.seconds(5, "s0", "s1", "s2")
        task = await leaving(scene, "s2")
        for _ in range(20):
            for shard in shards:
                await shard.work()
            await turns()
        if how == "stops":
            assert not task.done()
            await scene.controller.deregister_router("gone")
        assert await asyncio.wait_for(task, 10)

    play(act)


def test_at_its_deadline_it_goes_and_says_what_was_left_behind(play: Play, caplog: pytest.LogCaptureFixture) -> None:
    async def act(scene: Scene) -> None:
        await scene.start()
        await scene.wants(2)
        task = await leaving(scene, "s2", timeout_s=7.0)
        scene.now_s += 6.9
        await asyncio.sleep(0.25)
        assert not task.done(), "nobody copied anything"
        scene.now_s += 0.2
        assert not await asyncio.wait_for(task, 10)
        assert "stops with experts that no other shard took over" in caplog.text
        assert [seat.shard_id for seat in (await scene.controller.status()).shards] == ["s0", "s1"]
        await scene.seconds(1, "s0", "s1")
        del scene.shards["s2"]
        await scene.settle()
        assert (await scene.controller.status()).complete, "the others read them from the checkpoint"

    play(act)


def test_without_experts_it_waits_for_routers_no_longer_than_drain_s(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    async def act(scene: Scene) -> None:
        shards = await scene.start()
        await scene.wants(2)
        await scene.poll("slow", scene.term, scene.mesh.roster.epoch)
        task = await leaving(scene, "s2")
        while scene.mesh.roster.seat_of("s2") is not None:
            for shard in shards:
                if scene.mesh.roster.seat_of(shard.name) is not None:
                    await shard.work()
            await scene.poll("slow", scene.term, scene.mesh.roster.epoch)
            await asyncio.sleep(0.01)
        await scene.poll("slow", scene.term, scene.mesh.roster.epoch - 1)
        await asyncio.sleep(0.05)
        assert not task.done(), "the router still knows where it listens"
        scene.now_s += 2.9
        await scene.poll("slow", scene.term, scene.mesh.roster.epoch - 1)
        await asyncio.sleep(0.05)
        assert not task.done()
        scene.now_s += 0.2
        assert not await asyncio.wait_for(task, 10)
        assert "routers ['slow'] have not moved" in caplog.text

    play(act)


def test_if_all_shards_stop_nothing_is_handed_on(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.start()
        tasks = [await leaving(scene, f"s{rank}") for rank in range(3)]
        left = await asyncio.wait_for(asyncio.gather(*tasks), 10)
        assert False in left
        assert (await scene.controller.status()).shards == []

    play(act)


def test_where_slots_do_not_suffice_it_goes_at_once_with_a_reason(play: Play, caplog: pytest.LogCaptureFixture) -> None:
    async def act(scene: Scene) -> None:
        scene.counts = type(scene.counts)(2, 0)  # type: ignore[misc]
        await scene.restart()
        await scene.start(2)
        await scene.wants(1)
        task = await leaving(scene, "s1")
        assert not await asyncio.wait_for(task, 10)
        assert "6" in caplog.text
        problem = (await scene.controller.status()).migration.problem
        assert problem, "it stays until there are shards again"

    play(act)


def test_a_shard_that_has_left_is_not_asked_to_come_back(play: Play) -> None:
    """It sends signs of life until the call returns, which waits for routers."""

    async def act(scene: Scene) -> None:
        shards = await scene.start()
        await scene.wants(2)
        task = await leaving(scene, "s2")
        while len(scene.mesh.roster.seats) == 3:
            for shard in shards:
                await shard.work()
            await turns()
        answer = await scene.controller.heartbeat("s2", shard_status(rank=2))
        assert answer.known, "or it would rejoin"
        assert 2 not in scene.controller._shard_status
        await asyncio.wait_for(task, 10)
        assert not (await scene.controller.heartbeat("s3", None)).known

    play(act)


def test_a_shard_that_starts_leaves_at_once(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.start()
        await scene.wants(4)
        new = scene.shard("s3", 3)
        assert (await new.join()).rank == 3
        assert await asyncio.wait_for(scene.controller.leave("s3", 100.0), 10)
        assert (await scene.controller.status()).num_ranks == 3

    play(act)
