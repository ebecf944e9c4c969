"""A scene with the placement controller in this process, shards and routers that call it, and a clock of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from cluster.controller import autopilot as autopilot_module
from cluster.controller import client as client_module
from cluster.controller import deployment as controller_module
from cluster.controller import people as people_module
from cluster.controller import serve_watch as serve_watch_module
from cluster.controller.client import ControllerClient
from cluster.controller.deployment import PlacementController
from cluster.mesh.holdings import experts_by_rank
from cluster.mesh.messages import (
    CopyReport,
    JoinAnswer,
    JoinRequest,
    MembershipAnswer,
    MembershipRequest,
    OrderAnswer,
    OrderRequest,
    RejoinRequest,
    ShardHolding,
    Told,
)
from cluster.ray_joints import ReplicaCounts, ReplicaIdentity
from experts.protocol.membership import ShardEndpoint
from experts.protocol.orders import CopyResult

TINY = Path(__file__).parents[2] / "configs" / "tiny-cpu.yaml"
LAYERS, EXPERTS, SLOTS = 2, 6, 4
LIVE: dict[str, Any] = {
    "placement": {"policy": "linear"},
    "membership": {"heartbeat_s": 1, "lost_after_s": 5, "replace_after_s": 20, "drain_s": 3},
}


class LocalClient(ControllerClient):
    """Calls the controller that the scene has at that moment."""

    def __init__(self, scene: Scene) -> None:
        super().__init__("experts")
        self.scene = scene

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        return await getattr(self.scene.controller, method)(*args)


class SceneShard:
    """A shard's calls, one at a time. It holds what it holds: bool [L, E]."""

    def __init__(self, scene: Scene, name: str, serve_rank: int, node: str = "n") -> None:
        self.scene, self.name, self.serve_rank, self.node = scene, name, serve_rank, node
        self.held_LE = np.zeros((LAYERS, EXPERTS), np.bool_)
        self.num_slots = SLOTS
        self.rank: int | None = None
        self.term, self.version = "", -1
        self.target: dict[str, Any] | None = None
        self.told = Told()

    def endpoint(self, rank: int | None = None) -> ShardEndpoint:
        rank = self.rank if rank is None else rank
        assert rank is not None
        return ShardEndpoint(rank, self.name, "127.0.0.1", 1000 + rank, self.node, 1)

    async def join(self, loading: int | None = None) -> JoinAnswer:
        """Ask for a rank; with one, load its row."""
        request = JoinRequest(self.name, self.node, self.serve_rank, loading)
        answer = await self.scene.controller.join(request)
        if answer.rank is not None:
            assert answer.placement is not None
            self.rank, self.num_slots = answer.rank, answer.num_slots
            self.held_LE = experts_by_rank(answer.placement)[answer.rank]
        return answer

    def holding(self) -> ShardHolding:
        return ShardHolding(
            self.name, self.node, self.serve_rank, self.endpoint(), self.num_slots, 10, self.held_LE.copy()
        )

    async def ready(self) -> bool:
        return await self.scene.controller.ready(self.holding())

    async def rejoin(self, epoch: int = 0, stopping: bool = False) -> int | None:
        request = RejoinRequest(self.holding(), epoch, self.target, stopping, self.told)
        rank = await self.scene.controller.rejoin(request)
        self.rank = self.rank if rank is None else rank
        return rank

    async def heartbeat(self) -> None:
        answer = await self.scene.controller.heartbeat(self.name, None)
        if answer.known:
            self.told = answer.told

    async def ask(self, wait_s: float = 0.0) -> OrderAnswer:
        """Poll for the next order, without carrying it out."""
        known = -1 if self.target is None else int(self.target["version"])
        answer = await self.scene.controller.await_order(
            OrderRequest(self.name, self.term, self.version, known, wait_s)
        )
        self.term, self.target = answer.term, answer.target or self.target
        return answer

    async def work(self) -> bool:
        """Carry out the next order and report; False if there is none."""
        order = (await self.ask()).order
        if order is None:
            return False
        self.version = order.version
        for pair in order.release:
            self.held_LE[pair] = False
        for copy in order.copy:
            self.held_LE[copy.layer, copy.expert] = True
        assert self.held_LE.sum(1).max() <= self.num_slots
        results = tuple(CopyResult(copy.layer, copy.expert, "shm", 10, 0.1) for copy in order.copy)
        assert await self.scene.controller.report(CopyReport(self.name, self.held_LE.copy(), results))
        return True


class Scene:
    """A controller, its time, and its callers. Shards send a heartbeat every second and are lost after five."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        self.counts: ReplicaCounts | None = ReplicaCounts(3, 0)  # what Serve says
        self.asked_serve = 0
        self.offload: dict[str, Any] | None = None  # of shards, from the next life on
        self.shards: dict[str, SceneShard] = {}
        self.controller: Any = None
        clock = SimpleNamespace(monotonic=lambda: self.now_s, time=lambda: 1e9 + self.now_s)
        for module in (controller_module, people_module, autopilot_module):
            monkeypatch.setattr(module, "time", clock)
        monkeypatch.setattr(
            controller_module, "lower", lambda threads: None
        )  # the process of the tests keeps its priority
        monkeypatch.setattr(
            controller_module, "replica_identity", lambda: ReplicaIdentity("experts", "controller", 0, "n")
        )
        monkeypatch.setattr(serve_watch_module, "replicas_of", self._replicas_of)
        monkeypatch.setattr(client_module, "deployment_handle", lambda *_: None)
        self.client = LocalClient(self)

    def _replicas_of(self, app_name: str, deployment: str) -> ReplicaCounts | None:
        assert (app_name, deployment) == ("experts", "ExpertShard")
        self.asked_serve += 1
        return self.counts

    # The controller ---------------------------------------------------------------------------------------------------

    async def restart(
        self, live: dict[str, Any] | None = None, running: int = 0, secret_env: str | None = None
    ) -> None:
        """A first or a further life; Serve says how many shards run."""
        await self.end()
        self.counts = None if self.counts is None else ReplicaCounts(self.counts.wanted, running)
        config = yaml.safe_load(TINY.read_text())["applications"][0]["args"]
        config["shards"]["slots_per_rank"] = SLOTS
        config["shards"]["offload"] = self.offload
        config["mesh"] = {"secret_env": secret_env}
        self.controller = PlacementController.__new__(PlacementController)
        await self.controller.__init__(config, {"num_layers": LAYERS, "num_experts": EXPERTS}, None)
        self.controller._watch.cancel()  # the scene says when it looks
        self.controller._serve_watch.cancel()
        await self.controller.reconfigure(live or LIVE)
        await self.ask_serve()

    async def end(self) -> None:
        """Leave no task behind."""
        if self.controller is not None:
            for task in (self.controller._watch, self.controller._serve_watch):
                task.cancel()

    async def ask_serve(self) -> None:
        """The controller asks Serve how many shards it wants, if that is of interest to it."""
        self.controller._serve_watch.cancel()
        self.controller._serve_watch = asyncio.create_task(self.controller._serve.follow())
        asked, interested = self.asked_serve, self.controller._serve._of_interest
        while interested and self.asked_serve == asked:
            await asyncio.sleep(0.001)
        wanted = None if self.counts is None else self.counts.wanted
        while interested and wanted is not None and self.mesh.wanted != wanted:
            await asyncio.sleep(0.001)
        await turns()

    async def wants(self, count: int) -> None:
        """Serve wants another number of shards."""
        self.counts = ReplicaCounts(count, 0)
        self.mesh.wanted = count

    @property
    def mesh(self) -> Any:
        return self.controller._mesh

    # Shards -----------------------------------------------------------------------------------------------------------

    def shard(self, name: str, serve_rank: int, node: str = "n") -> SceneShard:
        self.shards[name] = SceneShard(self, name, serve_rank, node)
        return self.shards[name]

    async def start(self, count: int = 3) -> list[SceneShard]:
        """A cold start: s0, s1, ... join, load their rows, and serve at ranks 0, 1, ..."""
        shards = [self.shard(f"s{index}", index) for index in range(count)]
        for shard in shards:
            assert (await shard.join()).rank is None
        await turns()
        for rank, shard in enumerate(shards):
            assert (await shard.join()).rank == rank
            assert await shard.ready()
        return shards

    async def settle(self, routers: tuple[str, ...] = (), limit: int = 100) -> None:
        """Shards carry out orders and routers follow until nobody has anything to do."""
        for _ in range(limit):
            await turns(3)
            for router in routers:
                await self.poll(router, self.term, self.mesh.roster.epoch)
            busy = [await shard.work() for shard in list(self.shards.values()) if self._seated(shard)]
            if not any(busy) and not self.mesh.conductor.moving:
                return
            await self.seconds(1, *(name for name, shard in self.shards.items() if self._seated(shard)))
        raise AssertionError(f"no end: {await self.controller.status()}")

    def _seated(self, shard: SceneShard) -> bool:
        return self.mesh.roster.seat_of(shard.name) is not None

    async def seconds(self, count: int, *beating: str) -> None:
        """Time passes, the controller looks twice a second, and these shards send a heartbeat each second."""
        for half in range(2 * count):
            self.now_s += 0.5
            if half % 2:
                for name in beating:
                    assert (await self.controller.heartbeat(name, None)).known, name
            self.controller._look(self.now_s)
            await turns(2)

    # Routers ----------------------------------------------------------------------------------------------------------

    @property
    def term(self) -> str:
        return str(self.controller._term)

    async def poll(
        self, router: str, term: str = "", epoch: int = -1, lost: dict[int, str] | None = None, wait_s: float = 0.0
    ) -> MembershipAnswer:
        return await self.client.await_membership(
            MembershipRequest(router, term, epoch, lost or {}, wait_s), timeout_s=60
        )

    async def ranks_for(self, router: str, term: str = "", epoch: int = -1) -> list[int] | None:
        """Ranks in the membership that the router gets at once, None if it gets none."""
        membership = (await self.poll(router, term, epoch)).membership
        return None if membership is None else [found.rank for found in membership.endpoints if found is not None]


async def turns(count: int = 20) -> None:
    """Let everything that can go on do so."""
    for _ in range(count):
        await asyncio.sleep(0)


Play = Callable[[Callable[[Scene], Awaitable[None]]], None]
