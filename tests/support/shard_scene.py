"""A scene with one shard's deployment and the controller in this process, without Serve."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import yaml

from cluster.controller.client import ControllerLostError
from cluster.ray_joints import ReplicaIdentity
from cluster.shard import deployment as expert_shard
from cluster.shard import orders as orders_module
from cluster.shard.deployment import ExpertShard
from experts.shard import server as shard_server
from tests.support.controller_scene import LIVE, SLOTS, TINY, LocalClient, Scene
from tests.support.fake_shard_server import FakeShardServer

QUICK = {**LIVE, "membership": {"heartbeat_s": 0.01, "lost_after_s": 30, "drain_s": 0}}


class Shard(ExpertShard):
    """Without the farewell, which Serve alone can await."""

    def __del__(self) -> None:  # type: ignore[override]
        """No farewell."""


class Client(LocalClient):
    """Notes what was asked, and does not get through with some of it."""

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.asked: list[tuple[str, tuple[Any, ...], Any]] = []
        self.deaf_to: set[str] = set()

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        if method in self.deaf_to:
            raise ControllerLostError(f"no answer to {method}")
        answer = await super().call(method, *args, timeout_s=timeout_s)
        self.asked.append((method, args, answer))
        return answer

    async def call_with_retry(self, method: str, *args: Any, timeout_s: float, pause_s: float = 0.5) -> Any:
        return await self.call(method, *args, timeout_s=timeout_s)


class Cluster:
    """Shards s0 and s1, and "mine", whose process this is. Serve's rank of mine is 2."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scene = Scene(monkeypatch)
        self.client = Client(self.scene)
        self.shard: Any = Shard.__new__(Shard)
        monkeypatch.setattr(expert_shard, "replica_identity", lambda: ReplicaIdentity("experts", "mine", 2, "n"))
        monkeypatch.setattr(expert_shard, "node_address", lambda: "127.0.0.1")
        monkeypatch.setattr(expert_shard, "ControllerClient", lambda app_name: self.client)
        monkeypatch.setattr(expert_shard, "ASK_AGAIN_S", 0.001)
        monkeypatch.setattr(orders_module, "PAUSE_S", 0.001)
        monkeypatch.setattr(orders_module, "LONG_POLL_S", 0.02)
        monkeypatch.setattr(shard_server, "ShardServer", FakeShardServer)
        # The process of the tests keeps its priority.
        monkeypatch.setattr(expert_shard, "lower_all_but_one", lambda: concurrent.futures.ThreadPoolExecutor(1))

    @property
    def server(self) -> FakeShardServer:
        return self.shard._server  # type: ignore[no-any-return]

    def begin(self, join_timeout_s: float = 30, stop_timeout_s: float = 60) -> asyncio.Task[None]:
        """The start of the shard, which goes on until its server may listen."""
        config = yaml.safe_load(TINY.read_text())["applications"][0]["args"]
        config["shards"] |= {"slots_per_rank": SLOTS, "join_timeout_s": join_timeout_s}
        return asyncio.create_task(self.shard.__init__(config, stop_timeout_s))

    async def loading(self) -> asyncio.Task[None]:
        """A cold start of three shards, in which mine loads and the others serve."""
        start = self.begin()
        others = [self.scene.shard(f"s{index}", index) for index in range(2)]
        for shard in others:
            await shard.join()
        await self.until(lambda: hasattr(self.shard, "_server") and self.server.loading.is_set())
        for shard in others:
            assert (await shard.join()).rank == shard.serve_rank
            assert await shard.ready()
        return start

    async def serving(self) -> None:
        """A cold start that is done."""
        start = await self.loading()
        self.server.may_listen.set()
        await start

    async def until(self, condition: Callable[[], Any]) -> None:
        """Time passes meanwhile. The whole scene has a deadline."""
        while not condition():
            self.scene.now_s += 0.005
            for task in getattr(self.shard, "_tasks", ()):
                assert not task.done(), task
            await asyncio.sleep(0.001)

    async def restart_controller(self) -> None:
        await self.scene.restart(QUICK, running=3)

    def seats(self) -> dict[int, str]:
        return {seat.rank: seat.shard_id for seat in self.scene.mesh.roster.seats}

    def asked(self, method: str) -> list[tuple[Any, ...]]:
        """Arguments of the calls that got through."""
        return [args for name, args, _ in self.client.asked if name == method]

    async def end(self) -> None:
        if hasattr(self.shard, "_server"):
            self.server.may_listen.set()
        tasks = getattr(self.shard, "_tasks", [])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.scene.end()


PlayShard = Callable[[Callable[[Cluster], Awaitable[None]]], None]
