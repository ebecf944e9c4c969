"""A scene with the placement controller in this process and a clock of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from cluster.controller import deployment as controller_module
from cluster.controller.deployment import PlacementController
from cluster.controller.messages import JoinRequest, MembershipAnswer, MembershipRequest, RejoinRequest
from cluster.controller.roster import placement_digest
from experts.protocol.membership import ShardEndpoint
from placement.placement import Placement

TINY = Path(__file__).parents[2] / "configs" / "tiny-cpu.yaml"
PLACEMENT = Placement.linear(2, 6, 3)
DIGEST = placement_digest(PLACEMENT)


def endpoint(rank: int, incarnation: str = "a") -> ShardEndpoint:
    return ShardEndpoint(rank, f"{incarnation}{rank}", "127.0.0.1", 1000 + rank, "host", 1)


class Scene:
    """A controller, its time, and its callers. Shards send a heartbeat every second and are lost after five."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        self.controller = PlacementController.__new__(PlacementController)
        monkeypatch.setattr(controller_module, "time", SimpleNamespace(monotonic=lambda: self.now_s))

    async def restart(self) -> None:
        """A first or a further life."""
        config = yaml.safe_load(TINY.read_text())["applications"][0]["args"]
        self.controller = PlacementController.__new__(PlacementController)
        await self.controller.__init__(config, PLACEMENT.to_json(), None)  # type: ignore[misc]
        self.controller._watch.cancel()  # the scene says when it looks
        self.drain_s = self.controller._config.membership.drain_s

    async def serve(self, *ranks: int) -> None:
        for rank in ranks:
            assert (await self.controller.join(JoinRequest(f"s{rank}", "n", rank))).rank == rank
            assert await self.controller.ready(f"s{rank}", endpoint(rank))

    async def rejoin(self, rank: int, epoch: int, digest: str = DIGEST) -> bool:
        return await self.controller.rejoin(RejoinRequest(f"s{rank}", "n", endpoint(rank), epoch, digest, rank))

    async def seconds(self, count: int, *beating: int) -> None:
        """Time passes, the controller looks twice a second, and these ranks send a heartbeat each second."""
        for half in range(2 * count):
            self.now_s += 0.5
            if half % 2:
                for rank in beating:
                    assert (await self.controller.heartbeat(f"s{rank}", None)).known
            self.controller._look_for_silence(self.now_s)

    async def poll(
        self, router: str, term: str = "", epoch: int = -1, lost: dict[int, str] | None = None, wait_s: float = 0.0
    ) -> MembershipAnswer:
        return await self.controller.await_membership(MembershipRequest(router, term, epoch, lost or {}, wait_s))

    async def ranks_for(self, router: str, term: str = "", epoch: int = -1) -> list[int] | None:
        """Ranks in the membership that the router gets at once, None if it gets none."""
        membership = (await self.poll(router, term, epoch)).membership
        return None if membership is None else [found.rank for found in membership.endpoints if found is not None]


async def turns(count: int = 20) -> None:
    """Let everything that can go on do so."""
    for _ in range(count):
        await asyncio.sleep(0)


Play = Callable[[Callable[[Scene], Awaitable[None]]], None]
