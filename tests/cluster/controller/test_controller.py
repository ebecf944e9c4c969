"""The placement controller in this process, with a clock of its own: whom it takes out, and who may start."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from cluster.controller import deployment as controller_module
from cluster.controller.deployment import PlacementController
from cluster.controller.roster import placement_digest
from experts.protocol.membership import ShardEndpoint
from placement.placement import Placement
from tests.support.waiting import run_async

TINY = Path(__file__).parents[3] / "configs" / "tiny-cpu.yaml"
PLACEMENT = Placement.linear(2, 6, 3)
DIGEST = placement_digest(PLACEMENT)


def endpoint(rank: int) -> dict[str, Any]:
    return asdict(ShardEndpoint(rank, f"of-{rank}", "127.0.0.1", 1000 + rank, "host", 1))


class Scene:
    """A controller, the time that it sees, and its callers. Shards beat every second and are lost after five."""

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

    async def serve(self, *ranks: int) -> None:
        for rank in ranks:
            assert (await self.controller.join(f"s{rank}", "n", rank))["rank"] == rank
            assert await self.controller.ready(f"s{rank}", endpoint(rank))

    async def rejoin(self, rank: int, epoch: int) -> None:
        assert await self.controller.rejoin(f"s{rank}", "n", endpoint(rank), epoch, DIGEST, rank)

    async def seconds(self, count: int, *beating: int) -> None:
        """Time passes, the controller looks twice a second, and these ranks beat once."""
        for half in range(2 * count):
            self.now_s += 0.5
            if half % 2:
                for rank in beating:
                    assert (await self.controller.heartbeat(f"s{rank}", None))["known"]
            self.controller._look_for_silence(self.now_s)

    async def ranks_for(self, router: str, term: str = "", epoch: int = -1) -> list[int] | None:
        """Ranks that the membership names which the router gets at once, None if it gets none."""
        answer = await self.controller.await_membership(router, term, epoch, {}, 0.0)
        if answer["membership"] is None:
            return None
        return [rank for rank, found in enumerate(answer["membership"]["endpoints"]) if found is not None]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Scene], Awaitable[None]]], None]:
    """Runs one scene, from a cold start."""

    def run(act: Callable[[Scene], Awaitable[None]]) -> None:
        async def whole() -> None:
            scene = Scene(monkeypatch)
            await scene.restart()
            await act(scene)

        run_async(whole(), "the scene to end")

    return run


Play = Callable[[Callable[[Scene], Awaitable[None]]], None]


def test_a_controller_that_stood_still_takes_no_shard_out(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.serve(0, 1, 2)
        await scene.seconds(3, 0, 1, 2)
        before = (await scene.controller.status())["epoch"]
        scene.now_s += 60
        await scene.seconds(1, 0, 1)
        status = await scene.controller.status()
        assert (status["missing_ranks"], status["epoch"]) == ([], before)
        await scene.seconds(3, 0, 1)
        assert (await scene.controller.status())["missing_ranks"] == []
        await scene.seconds(2, 0, 1)
        assert (await scene.controller.status())["missing_ranks"] == [2], "a shard that is gone is found as ever"

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
        await scene.rejoin(1, epoch=7)
        await scene.rejoin(0, epoch=7)
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
        await scene.rejoin(0, epoch=1)
        await scene.seconds(30, 0)
        assert await scene.ranks_for("new") is None
        await scene.serve(1, 2)
        assert await scene.ranks_for("new") == [0, 1, 2]

    play(act)


def test_a_shard_that_was_late_in_a_cold_start_is_no_sign_of_an_earlier_life(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.serve(0, 1)
        for _ in range(3):
            epoch = (await scene.controller.status())["epoch"]
            await scene.seconds(6, 1)
            await scene.rejoin(0, epoch)
        assert await scene.ranks_for("new") is None

    play(act)
