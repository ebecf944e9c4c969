"""A shard's deployment and the controller in one process: how it starts, and what ends its start."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from experts.checkpoint.errors import CheckpointError, UnreachableError
from tests.support.controller_scene import EXPERTS, LAYERS, SLOTS
from tests.support.shard_scene import Cluster, PlayShard

ROW = LAYERS * EXPERTS // 3  # experts of a shard, if three have one replica of each


def test_at_a_cold_start_it_loads_its_row_and_serves(play: PlayShard) -> None:
    async def act(cluster: Cluster) -> None:
        start = await cluster.loading()
        assert cluster.seats() == {0: "s0", 1: "s1", 2: "mine"}
        assert not start.done()
        assert not cluster.scene.mesh.open
        cluster.server.may_listen.set()
        await start
        assert cluster.server.done == [("start", 2, ROW)]
        assert cluster.scene.mesh.open
        (ready,) = cluster.asked("ready")
        assert (ready[0].num_slots, ready[0].expert_bytes, ready[0].held_LE.sum()) == (SLOTS, 10, ROW)
        await cluster.shard.check_health()
        assert (await cluster.shard.status()).rank == 2

    play(act)


def test_later_it_starts_empty_and_is_filled_by_orders(play: PlayShard) -> None:
    async def act(cluster: Cluster) -> None:
        shards = await cluster.scene.start(3)
        had_LE = shards[2].held_LE.copy()
        cluster.scene.mesh.leave("s2", cluster.scene.now_s)
        start = cluster.begin()
        await cluster.until(lambda: hasattr(cluster.shard, "_server") and cluster.server.loading.is_set())
        cluster.server.may_listen.set()
        await start
        assert cluster.server.done == [("start", 2, 0)]
        await cluster.until(lambda: cluster.scene.mesh.unserved == 0)
        assert np.array_equal(cluster.shard._orders.held_LE(), had_LE)
        assert [done[0] for done in cluster.server.done[1:]] == ["copy"] * ROW
        assert cluster.scene.mesh.conductor.counters.copies == ROW, "each result was told once"

    play(act)


def test_without_a_rank_it_asks_until_one_is_given(play: PlayShard) -> None:
    async def act(cluster: Cluster) -> None:
        start = cluster.begin()
        await cluster.until(lambda: len(cluster.asked("join")) >= 3)
        assert not start.done()
        others = [cluster.scene.shard(f"s{index}", index) for index in range(2)]
        for shard in others:
            await shard.join()
        await cluster.until(lambda: hasattr(cluster.shard, "_server") and cluster.server.loading.is_set())
        cluster.server.may_listen.set()
        await start

    play(act)


def test_without_a_rank_in_time_it_says_why(play: PlayShard) -> None:
    async def act(cluster: Cluster) -> None:
        with pytest.raises(RuntimeError, match=r"no rank within 0\.05 s: 1 of 3 shards are here to plan for"):
            await cluster.begin(join_timeout_s=0.05)

    play(act)


def test_a_refusal_ends_the_start_at_once(play: PlayShard) -> None:
    async def act(cluster: Cluster) -> None:
        await cluster.scene.restart({"placement": {"min_replicas": 4}})
        start = cluster.begin()
        for index in range(2):
            await cluster.scene.shard(f"s{index}", index).join()
        with pytest.raises(RuntimeError, match="slots"):
            await asyncio.wait_for(start, 10)

    play(act)


def test_a_mesh_without_its_secret_is_refused_at_once(play: PlayShard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_HERE", raising=False)

    async def act(cluster: Cluster) -> None:
        await cluster.scene.restart(secret_env="NOT_HERE")
        with pytest.raises(RuntimeError, match=r"^mesh\.secret_env: the environment variable NOT_HERE holds no secret"):
            await asyncio.wait_for(cluster.begin(), 10)
        assert "NOT_HERE" in (await cluster.scene.controller.status()).refusal

    play(act)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (CheckpointError("expert 3 of layer 1\nis missing"), "shard 2: expert 3 of layer 1 is missing"),
        (UnreachableError("the hub does not answer"), ""),
        (OSError("a disk that may come back"), ""),
    ],
)
def test_what_will_not_change_is_told_until_a_successor_serves(play: PlayShard, error: Exception, told: str) -> None:
    async def act(cluster: Cluster) -> None:
        start = await cluster.loading()
        cluster.server.fails = error
        cluster.server.may_listen.set()
        with pytest.raises(type(error)):
            await start
        assert (await cluster.scene.controller.status()).refusal == told
        successor = cluster.scene.shard("next", 2)
        cluster.scene.mesh.leave("mine", cluster.scene.now_s)
        assert (await successor.join()).rank == 2
        assert await successor.ready()
        assert (await cluster.scene.controller.status()).refusal == ""

    play(act)
