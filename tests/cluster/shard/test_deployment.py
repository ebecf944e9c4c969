"""A shard's deployment and the controller in one process, without Serve: restarts at the worst times, and health."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.controller.client import ControllerClient, ControllerLostError
from cluster.controller.deployment import PlacementController
from cluster.controller.messages import JoinRequest
from cluster.ray_joints import ReplicaIdentity
from cluster.shard import deployment as expert_shard
from cluster.shard.deployment import ExpertShard
from experts.protocol.membership import ShardEndpoint
from experts.protocol.status import ShardStatus
from experts.shard import server as shard_server
from placement.placement import Placement
from tests.support.serve.statuses import shard_status
from tests.support.waiting import run_async

TINY = Path(__file__).parents[3] / "configs" / "tiny-cpu.yaml"
PLACEMENT = Placement.linear(2, 8, 4, 2)


def config(join_timeout_s: float = 30) -> dict[str, Any]:
    args = yaml.safe_load(TINY.read_text())["applications"][0]["args"]
    times = {"heartbeat_s": 0.01, "lost_after_s": 30, "join_timeout_s": join_timeout_s, "drain_s": 0}
    return {**args, "membership": times}


class FakeServer:
    """Loads until it is told that it may listen."""

    def __init__(self, settings: Any) -> None:
        self.endpoint: ShardEndpoint | None = None
        self.loading, self.may_listen = threading.Event(), threading.Event()
        self.facts: dict[str, Any] = {}
        self.stopped = False

    def start(self, placement: Placement, rank: int, epoch: int) -> ShardEndpoint:
        self.loading.set()
        assert self.may_listen.wait(60)
        self.endpoint = ShardEndpoint(rank, "a", "127.0.0.1", 1000, "host", 1)
        return self.endpoint

    def status(self) -> ShardStatus:
        assert self.endpoint is not None
        return shard_status(self.endpoint.rank, **self.facts)

    def stop(self) -> None:
        self.stopped = True


class Shard(ExpertShard):
    """Without the farewell, which Serve alone can await."""

    def __del__(self) -> None:  # type: ignore[override]
        """No farewell."""


class Cluster(ControllerClient):
    """One controller at a time, and a shard that Serve calls the second, on the second node, whose rank here is 2."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.controller: Any = None
        self.asked: list[tuple[Any, ...]] = []
        self.deaf_to: set[str] = set()
        self.shard = Shard.__new__(Shard)
        monkeypatch.setattr(expert_shard, "replica_identity", lambda: ReplicaIdentity("experts", "b1", 1, "b"))
        monkeypatch.setattr(expert_shard, "node_address", lambda: "127.0.0.1")
        monkeypatch.setattr(expert_shard, "ControllerClient", lambda app_name: self)
        monkeypatch.setattr(shard_server, "ShardServer", FakeServer)

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        if method in self.deaf_to:
            raise ControllerLostError(f"no answer to {method}")
        answer = await getattr(self.controller, method)(*args)
        self.asked.append((method, args, answer))
        return answer

    async def call_with_retry(self, method: str, *args: Any, timeout_s: float, pause_s: float = 0.5) -> Any:
        return await self.call(method, *args, timeout_s=timeout_s)

    async def restart_controller(self) -> None:
        controller: Any = PlacementController.__new__(PlacementController)
        await controller.__init__(config(), PLACEMENT.to_json(), None)
        controller._watch.cancel()
        self.controller = controller

    async def begin_loading(self) -> asyncio.Task[None]:
        """The start of the shard, which goes on until its server may listen."""
        assert (await self.controller.join(JoinRequest("a1", "a", 0))).rank == 0
        start: Any = self.shard.__init__(config())  # type: ignore[misc]
        task = asyncio.create_task(start)
        await self.until(lambda: hasattr(self.shard, "_server") and self.shard._server.loading.is_set())
        return task

    async def until(self, condition: Callable[[], bool]) -> None:
        """The whole scene has a deadline."""
        while not condition():
            await asyncio.sleep(0)

    async def fill_all_ranks(self) -> None:
        """With shards that Serve gave other ranks than ours, so that ours is no successor of theirs."""
        for index in range(4):
            assert (await self.controller.join(JoinRequest(f"x{index}", "ab"[index // 2], 9))).rank == index

    def seats(self) -> dict[int, str]:
        return {seat.rank: seat.shard_id for seat in self.controller._roster.seats}


Play = Callable[[Callable[[Cluster], Awaitable[None]]], None]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Runs one scene."""

    def run(act: Callable[[Cluster], Awaitable[None]]) -> None:
        async def whole() -> None:
            cluster = Cluster(monkeypatch)
            await cluster.restart_controller()
            try:
                await act(cluster)
            finally:
                if (server := getattr(cluster.shard, "_server", None)) is not None:
                    server.may_listen.set()
                if (heart := getattr(cluster.shard, "_heart", None)) is not None:
                    heart.cancel()

        run_async(whole(), "the scene to end")

    return run


def test_a_shard_that_loads_asks_a_restarted_controller_for_the_rank_that_it_loads(play: Play) -> None:
    async def act(cluster: Cluster) -> None:
        start = await cluster.begin_loading()
        assert cluster.seats() == {0: "a1", 2: "b1"}
        await cluster.restart_controller()
        await cluster.until(lambda: bool(cluster.seats()))
        assert cluster.seats() == {2: "b1"}, "whoever comes first, the blocks are as they were"
        cluster.shard._server.may_listen.set()
        await start
        assert cluster.controller._roster.endpoints[2] is not None
        assert "rejoin" not in [method for method, *_ in cluster.asked]
        await cluster.shard.check_health()

    play(act)


@pytest.mark.parametrize("taken", [False, True])
def test_a_controller_that_restarts_as_loading_ends_learns_who_serves(play: Play, taken: bool) -> None:
    async def act(cluster: Cluster) -> None:
        start = await cluster.begin_loading()
        cluster.deaf_to = {"heartbeat", "join"}
        await cluster.restart_controller()
        if taken:
            assert (await cluster.controller.join(JoinRequest("x", "b", 2))).rank == 2
        cluster.shard._server.may_listen.set()
        if taken:
            with pytest.raises(RuntimeError, match="rank 2 was given to another shard while this one loaded"):
                await start
        else:
            await start
            assert cluster.controller._roster.endpoints[2] is not None

    play(act)


def test_a_shard_that_computes_nothing_is_not_healthy(play: Play) -> None:
    async def act(cluster: Cluster) -> None:
        start = await cluster.begin_loading()
        cluster.shard._server.may_listen.set()
        await start
        await cluster.shard.check_health()
        cluster.shard._server.facts = {"fault": "CUDA error"}
        with pytest.raises(RuntimeError, match="computes nothing: CUDA error"):
            await cluster.shard.check_health()
        cluster.shard._server.facts = {"alive": False}
        with pytest.raises(RuntimeError, match="compute loop has ended"):
            await cluster.shard.check_health()

    play(act)


def test_a_shard_whose_rank_went_to_another_restarts(play: Play) -> None:
    async def act(cluster: Cluster) -> None:
        start = await cluster.begin_loading()
        cluster.shard._server.may_listen.set()
        await start
        cluster.deaf_to = {"heartbeat"}
        await cluster.restart_controller()
        assert (await cluster.controller.join(JoinRequest("x", "b", 2))).rank == 2
        cluster.deaf_to = set()
        await cluster.until(lambda: cluster.shard._fault is not None)
        with pytest.raises(RuntimeError, match="the controller has another shard or placement for rank 2; restarting"):
            await cluster.shard.check_health()

    play(act)


def test_a_shard_that_serves_tells_its_status_and_hears_of_epochs(play: Play) -> None:
    async def act(cluster: Cluster) -> None:
        start = await cluster.begin_loading()
        cluster.shard._server.may_listen.set()
        await start
        cluster.controller._roster.raise_epoch_above(41)
        await cluster.until(lambda: cluster.shard._epoch == 42)
        await cluster.until(lambda: cluster.asked[-1][0] == "heartbeat")
        assert cluster.asked[-1][1] == ("b1", cluster.shard._server.status())
        await cluster.restart_controller()
        await cluster.until(lambda: cluster.seats() == {2: "b1"})
        assert cluster.controller._roster.epoch > 42, "it goes on above what the shard has heard"

    play(act)


def test_a_shard_without_a_rank_asks_until_one_is_free(play: Play) -> None:
    async def act(cluster: Cluster) -> None:
        await cluster.fill_all_ranks()
        start: Any = cluster.shard.__init__(config())  # type: ignore[misc]
        task = asyncio.create_task(start)
        await cluster.until(lambda: [method for method, *_ in cluster.asked].count("join") >= 3)
        await cluster.controller.leave("x3")
        await cluster.until(lambda: cluster.shard._server.loading.is_set())
        assert cluster.seats()[3] == "b1"
        cluster.shard._server.may_listen.set()
        await task

    play(act)


def test_a_shard_that_gets_no_rank_in_time_says_why(play: Play) -> None:
    async def act(cluster: Cluster) -> None:
        await cluster.fill_all_ranks()
        start: Any = cluster.shard.__init__(config(join_timeout_s=0.05))  # type: ignore[misc]
        with pytest.raises(RuntimeError, match=r"no rank within 0\.05 s: all 4 ranks are taken"):
            await start

    play(act)


@pytest.mark.parametrize("answers", [True, False])
def test_a_shard_that_stops_leaves_first_if_the_controller_answers(play: Play, answers: bool) -> None:
    async def act(cluster: Cluster) -> None:
        start = await cluster.begin_loading()
        cluster.shard._server.may_listen.set()
        await start
        cluster.deaf_to = set() if answers else {"leave"}
        await ExpertShard.__del__(cluster.shard)  # type: ignore[misc]
        assert cluster.seats() == ({0: "a1"} if answers else {0: "a1", 2: "b1"})
        assert cluster.shard._server.stopped
        assert cluster.shard._heart is not None
        with pytest.raises(asyncio.CancelledError):
            await cluster.shard._heart

    play(act)
