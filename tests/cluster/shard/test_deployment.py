"""A shard's deployment and the controller in one process: restarts at the worst times, orders, stopping."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from cluster.controller import planner
from cluster.controller.client import ControllerGoneError, ControllerLostError
from cluster.mesh.messages import Told
from cluster.mesh.planning import Plan, ShardsAtHand
from cluster.shard.deployment import ExpertShard
from experts.protocol.secret import MeshSecret
from placement.placement import Placement
from tests.support.controller_scene import EXPERTS, LAYERS, turns
from tests.support.shard_scene import Cluster, PlayShard

ROW = LAYERS * EXPERTS // 3  # experts of a shard, if three have one replica of each


def test_it_hears_which_experts_are_hot_before_it_loads(play: PlayShard, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the placement was planned for: a shard that offloads has those in memory first."""
    load_LE = np.arange(LAYERS * EXPERTS, dtype=np.float64).reshape(LAYERS, EXPERTS)

    async def plan(section: Any, model: Any, shards: ShardsAtHand) -> Plan:
        return Plan(Placement.linear(LAYERS, EXPERTS, shards.num_ranks), load_LE)

    async def act(cluster: Cluster) -> None:
        await cluster.serving()
        assert np.array_equal(cluster.server.load_LE, load_LE)

    monkeypatch.setattr(planner, "plan_in_a_process", plan)
    play(act)


# --- restarts of the controller -----------------------------------------------------------------------------------


def test_while_it_loads_it_asks_a_restarted_controller_for_its_rank_again(play: PlayShard) -> None:
    async def act(cluster: Cluster) -> None:
        start = await cluster.loading()
        await cluster.restart_controller()
        await cluster.until(lambda: bool(cluster.seats()))
        assert cluster.seats() == {2: "mine"}
        cluster.server.may_listen.set()
        await start
        assert cluster.scene.mesh.roster.at(2).serving
        assert cluster.asked("rejoin") == []
        await cluster.shard.check_health()

    play(act)


@pytest.mark.parametrize("taken", [False, True])
def test_a_controller_that_restarts_as_loading_ends_learns_who_serves(play: PlayShard, taken: bool) -> None:
    async def act(cluster: Cluster) -> None:
        start = await cluster.loading()
        cluster.client.deaf_to = {"heartbeat", "join"}
        await cluster.restart_controller()
        if taken:
            other = cluster.scene.shards["s0"]
            other.rank = 2
            await other.rejoin()
        cluster.server.may_listen.set()
        await start
        rank = 0 if taken else 2
        assert cluster.seats()[rank] == "mine"
        assert cluster.server.endpoint is not None
        assert cluster.server.endpoint.rank == rank == cluster.shard._rank
        await cluster.shard.check_health()

    play(act)


def test_it_tells_a_restarted_controller_what_it_holds_and_the_newest_target(play: PlayShard) -> None:
    async def act(cluster: Cluster) -> None:
        await cluster.serving()
        cluster.scene.mesh.roster.raise_epoch_above(41)
        await cluster.until(lambda: cluster.shard._epoch == 42 and cluster.shard._orders.target is not None)
        (_, status) = cluster.asked("heartbeat")[-1]
        assert status == cluster.server.status()
        await cluster.restart_controller()
        await cluster.until(lambda: cluster.seats() == {2: "mine"})
        (request,) = cluster.asked("rejoin")[-1]
        assert (request.epoch, request.stopping, request.target["version"]) == (42, False, 1)
        assert request.holding.held_LE.sum() == ROW
        assert cluster.scene.mesh.roster.epoch > 42, "it goes on above what the shard has heard"
        assert cluster.scene.mesh.keeper.target.version == 1

    play(act)


def test_it_tells_a_restarted_controller_that_it_is_drained_and_all_is_paused(play: PlayShard) -> None:
    async def act(cluster: Cluster) -> None:
        await cluster.serving()
        await cluster.scene.controller.pause(True)
        await cluster.until(lambda: cluster.shard._told == Told(drained=False, paused=True))
        assert await cluster.scene.controller.drain(2) == ""
        await cluster.until(lambda: cluster.shard._told == Told(drained=True, paused=True))
        await cluster.restart_controller()
        await cluster.until(lambda: cluster.seats() == {2: "mine"})
        assert cluster.scene.mesh.told("mine") == Told(drained=True, paused=True)

    play(act)


@pytest.mark.parametrize("loading", [True, False])
def test_a_restarted_controller_learns_the_secret_from_its_shards(play: PlayShard, loading: bool) -> None:
    async def act(cluster: Cluster) -> None:
        if loading:
            start = await cluster.loading()
        else:
            await cluster.serving()
        [secret] = cluster.server.secrets
        await cluster.restart_controller()
        await cluster.until(lambda: cluster.seats() == {2: "mine"})
        assert await cluster.scene.controller.mesh_secret(None) == secret
        assert set(cluster.server.secrets) == {secret}
        for told in (await cluster.scene.controller.status(), cluster.client.asked):
            assert secret.reveal() not in repr(told)
        if loading:
            cluster.server.may_listen.set()
            await start

    play(act)


def test_a_shard_that_was_away_takes_on_the_secret_that_the_others_have(play: PlayShard) -> None:
    async def act(cluster: Cluster) -> None:
        await cluster.serving()
        cluster.client.deaf_to = {"heartbeat", "mesh_secret"}
        await cluster.restart_controller()
        theirs = await cluster.scene.controller.mesh_secret(MeshSecret.generate())
        cluster.client.deaf_to = set()
        await cluster.until(lambda: cluster.server.secrets[-1] == theirs)

    play(act)


def test_another_rank_is_no_reason_to_restart(play: PlayShard) -> None:
    async def act(cluster: Cluster) -> None:
        await cluster.serving()
        cluster.client.deaf_to = {"heartbeat", "rejoin"}
        await cluster.restart_controller()
        other = cluster.scene.shards["s1"]
        other.rank = 2
        assert await other.rejoin() == 2
        cluster.client.deaf_to = set()
        await cluster.until(lambda: len(cluster.seats()) == 2)
        assert cluster.seats() == {0: "mine", 2: "s1"}
        await cluster.until(lambda: cluster.server.endpoint.rank == 0)  # type: ignore[union-attr]
        assert cluster.server.endpoint.incarnation == "mine", "the same process"  # type: ignore[union-attr]
        await cluster.shard.check_health()

    play(act)


def test_a_controller_of_another_model_makes_it_restart(play: PlayShard) -> None:
    async def act(cluster: Cluster) -> None:
        await cluster.serving()
        cluster.client.deaf_to = {"heartbeat"}
        await cluster.restart_controller()
        cluster.scene.mesh.model = type(cluster.scene.mesh.model)(LAYERS, EXPERTS + 1)
        cluster.client.deaf_to = set()
        await cluster.until(lambda: cluster.shard._fault is not None)
        with pytest.raises(RuntimeError, match="the controller is of another model; restarting"):
            await cluster.shard.check_health()

    play(act)


def test_it_serves_on_while_the_controller_is_away(play: PlayShard, caplog: pytest.LogCaptureFixture) -> None:
    async def act(cluster: Cluster) -> None:
        await cluster.serving()
        cluster.client.deaf_to = {"heartbeat", "await_order"}
        await cluster.until(
            lambda: "no answer to heartbeat" in caplog.text and "no answer to await_order" in caplog.text
        )
        await cluster.shard.check_health()

    play(act)


# --- health and orders --------------------------------------------------------------------------------------------


def test_a_shard_that_computes_nothing_is_not_healthy(play: PlayShard) -> None:
    async def act(cluster: Cluster) -> None:
        await cluster.serving()
        await cluster.shard.check_health()
        cluster.server.facts = {"fault": "CUDA error"}
        with pytest.raises(RuntimeError, match="computes nothing: CUDA error"):
            await cluster.shard.check_health()
        cluster.server.facts = {"alive": False}
        with pytest.raises(RuntimeError, match="compute loop has ended"):
            await cluster.shard.check_health()

    play(act)


@pytest.mark.parametrize("index", [0, 1])
def test_a_shard_whose_task_ended_is_not_healthy(play: PlayShard, index: int) -> None:
    async def act(cluster: Cluster) -> None:
        await cluster.serving()
        name = cluster.shard._tasks[index].get_name()
        cluster.shard._tasks[index].cancel()
        await turns()
        cluster.shard._tasks[index] = asyncio.create_task(asyncio.sleep(0), name=name)
        await turns()
        with pytest.raises(RuntimeError, match=f"{name} of this shard ended: None"):
            await cluster.shard.check_health()

    play(act)


def test_a_placement_by_command_reaches_it(play: PlayShard) -> None:
    async def act(cluster: Cluster) -> None:
        await cluster.serving()
        swapped = np.array([[4, 1, 2, 3, 0, 5]] * LAYERS, np.int32)  # 0 and 4 change places
        view = await cluster.scene.controller.apply(Placement(3, 1, EXPERTS, swapped), False)
        assert view.accepted
        await cluster.until(lambda: len(cluster.server.done) == 1 + LAYERS)
        while cluster.scene.mesh.conductor.moving:
            await cluster.scene.shards["s0"].work()
            await asyncio.sleep(0.001)
        await cluster.until(lambda: len(cluster.server.done) == 1 + 2 * LAYERS)
        assert [done[:3] for done in cluster.server.done[1:]] == [
            *(("copy", layer, 0) for layer in range(LAYERS)),
            *(("release", layer, 4) for layer in range(LAYERS)),
        ]

    play(act)


# --- stopping -----------------------------------------------------------------------------------------------------


def test_a_shard_that_stops_hands_on_what_only_it_has_first(play: PlayShard) -> None:
    async def act(cluster: Cluster) -> None:
        await cluster.serving()
        await cluster.scene.wants(2)
        stop = asyncio.create_task(ExpertShard.__del__(cluster.shard))  # type: ignore[misc, arg-type]
        await asyncio.sleep(0.05)
        assert not stop.done()
        assert not cluster.server.stopped, "it answers until the others have its experts"
        while not stop.done():
            for shard in cluster.scene.shards.values():
                await shard.work()
            await asyncio.sleep(0.001)
        await stop
        assert cluster.server.stopped
        assert cluster.seats() == {0: "s0", 1: "s1"}
        assert cluster.scene.mesh.unserved == 0
        assert all(task.cancelled() or task.cancelling() for task in cluster.shard._tasks)

    play(act)


def test_it_asks_for_as_long_as_serve_lets_it_stop(play: PlayShard) -> None:
    async def act(cluster: Cluster) -> None:
        await cluster.serving()
        cluster.client.deaf_to = {"leave"}
        cluster.shard._stop_timeout_s = 60.0
        waited: list[float] = []

        async def call(method: str, *args: Any, timeout_s: float) -> Any:
            if method == "leave":
                waited.append(args[1])
            raise ControllerLostError(f"no answer to {method}")

        cluster.client.call = call  # type: ignore[method-assign]
        await ExpertShard.__del__(cluster.shard)  # type: ignore[misc]
        assert waited == [55.0], "five seconds are left for the rest"
        assert cluster.server.stopped, "it stops all the same"

    play(act)


def test_it_does_not_wait_for_a_controller_that_is_gone(play: PlayShard) -> None:
    async def act(cluster: Cluster) -> None:
        await cluster.serving()
        called = cluster.client.call
        asked = asyncio.Event()

        async def call(method: str, *args: Any, timeout_s: float) -> Any:
            if method == "leave":
                asked.set()
                await asyncio.Event().wait()  # in the queue of Serve's handle
            if method == "heartbeat" and asked.is_set():
                raise ControllerGoneError("heartbeat reaches nobody")
            return await called(method, *args, timeout_s=timeout_s)

        cluster.client.call = call  # type: ignore[method-assign]
        await asyncio.wait_for(ExpertShard.__del__(cluster.shard), 30)  # type: ignore[misc, arg-type]
        assert asked.is_set()
        assert cluster.server.stopped

    play(act)


def test_a_controller_that_came_back_is_asked_for_leave(play: PlayShard) -> None:
    async def act(cluster: Cluster) -> None:
        await cluster.serving()
        cluster.shard._controller_gone.set()
        beats = len(cluster.asked("heartbeat"))
        await cluster.until(lambda: len(cluster.asked("heartbeat")) >= beats + 2)
        cluster.client.deaf_to = {"heartbeat"}
        await cluster.scene.wants(2)
        stop = asyncio.create_task(ExpertShard.__del__(cluster.shard))  # type: ignore[misc, arg-type]
        while not stop.done():
            for shard in cluster.scene.shards.values():
                await shard.work()
            await asyncio.sleep(0.001)
        await stop
        assert len(cluster.asked("leave")) == 1

    play(act)


def test_a_shard_that_has_no_rank_yet_stops_at_once(play: PlayShard) -> None:
    async def act(cluster: Cluster) -> None:
        start = cluster.begin()
        await cluster.until(lambda: len(cluster.asked("join")) >= 1)
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)
        await ExpertShard.__del__(cluster.shard)  # type: ignore[misc]
        assert cluster.asked("leave") == []

    play(act)
