"""What changes a running mesh: settings, commands, drains, a pause; and what of it is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cluster.config.parse import ConfigError
from placement.placement import Placement
from tests.support.controller_scene import EXPERTS, LAYERS, LIVE, Play, Scene, turns

SHIFTED = Placement(3, 1, EXPERTS, np.array([[0, 3, 2, 1, 4, 5]] * LAYERS, np.int32))  # 1 and 3 change places


# --- settings -----------------------------------------------------------------------------------------------------


def test_another_policy_is_planned_and_reached_with_few_copies(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.start()
        await scene.controller.reconfigure({**LIVE, "placement": {"min_replicas": 2}})
        await turns()
        migration = (await scene.controller.status()).migration
        assert (migration.target_version, migration.origin, migration.moving) == (2, "config", True)
        await scene.settle(("r",))
        status = await scene.controller.status()
        assert (status.migration.sole_copies, status.migration.target_version) == (0, 2)
        assert status.migration.copies == LAYERS * EXPERTS, "one more of each, and nothing else moved"

    play(act)


def test_settings_that_are_no_policy_need_no_plan(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.start()
        await scene.controller.reconfigure({**LIVE, "membership": {"heartbeat_s": 2, "lost_after_s": 7}})
        await turns()
        assert (await scene.controller.status()).migration.target_version == 1
        answer = await scene.controller.heartbeat("s0", None)
        assert (answer.times.heartbeat_s, answer.times.lost_after_s) == (2, 7)

    play(act)


def test_wrong_settings_are_refused_while_nothing_serves(play: Play) -> None:
    async def act(scene: Scene) -> None:
        with pytest.raises(ConfigError, match=r"user_config of PlacementController.*placement\.policy"):
            await scene.controller.reconfigure({"placement": {"policy": "circular"}})

    play(act)


def test_wrong_settings_leave_a_running_mesh_as_it_is_and_the_status_says_why(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.start()
        await scene.controller.reconfigure({"placement": {"policy": "circular"}})
        migration = (await scene.controller.status()).migration
        assert "placement.policy" in migration.problem
        assert migration.target_version == 1
        assert (await scene.controller.heartbeat("s0", None)).times.lost_after_s == 5

    play(act)


def test_a_policy_that_does_not_fit_is_a_problem_and_is_planned_once(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.start()
        await scene.controller.reconfigure({**LIVE, "placement": {"min_replicas": 3}})
        await turns()
        for _ in range(3):
            await scene.seconds(1, "s0", "s1", "s2")
            migration = (await scene.controller.status()).migration
            assert "18" in migration.problem, "slots that three replicas of six experts need"
            assert (migration.target_version, migration.moving) == (1, False)
        await scene.controller.reconfigure(LIVE)
        await scene.settle()
        assert (await scene.controller.status()).migration.problem == ""

    play(act)


# --- a placement by command ---------------------------------------------------------------------------------------


def test_a_dry_run_says_what_it_takes_and_changes_nothing(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.start()
        view = await scene.client.apply(SHIFTED, True, timeout_s=5)
        assert (view.accepted, view.target_version, view.copies, view.reason) == (True, 0, 2 * LAYERS, "")
        assert sum(view.bytes_by_nearness.values()) == 2 * LAYERS * 10
        assert view.rounds >= 1
        assert view.expected_s > 0
        assert (await scene.controller.status()).migration.target_version == 1

    play(act)


def test_a_placement_that_is_applied_is_reached(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.start()
        view = await scene.client.apply(SHIFTED, False, timeout_s=5)
        assert (view.accepted, view.target_version) == (True, 2)
        await scene.settle(("r",))
        assert (await scene.controller.placement()).experts_of_rank == [[[0, 3]] * 2, [[1, 2]] * 2, [[4, 5]] * 2]
        history = await scene.client.history(timeout_s=5)
        assert [(entry.version, entry.origin, entry.outcome) for entry in history] == [
            (1, "first", "reached"),
            (2, "command", "reached"),
        ]
        assert (history[1].copies, history[1].copied_bytes) == (view.copies, 10 * view.copies)
        assert history[1].ended is not None
        assert history[1].ended >= history[1].begun

    play(act)


def test_a_target_that_another_replaces_is_history(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.start()
        await scene.client.pause(True, timeout_s=5)
        for placement in (SHIFTED, Placement.linear(LAYERS, EXPERTS, 3)):
            assert (await scene.client.apply(placement, False, timeout_s=5)).accepted
        history = await scene.client.history(timeout_s=5)
        assert [entry.outcome for entry in history] == ["reached", "replaced", "under way"]

    play(act)


@pytest.mark.parametrize(
    ("placement", "reason"),
    [
        (Placement.linear(LAYERS, EXPERTS, 4), "rank 3; shards take them at [0, 1, 2]"),
        (Placement.linear(LAYERS, EXPERTS, 1), "6 slots in a layer of rank 0, whose shard has 4"),
        (Placement.linear(LAYERS + 1, EXPERTS, 3), "3"),
        (Placement.linear(LAYERS, EXPERTS + 1, 3), "7"),
        (Placement(3, 1, EXPERTS, np.array([[0, 1, 2, 3, 4, -1]] * LAYERS), partial=True), "it lacks experts"),
    ],
)
def test_a_placement_that_does_not_fit_is_refused_by_name(play: Play, placement: Placement, reason: str) -> None:
    async def act(scene: Scene) -> None:
        await scene.start()
        for dry_run in (True, False):
            view = await scene.client.apply(placement, dry_run, timeout_s=5)
            assert not view.accepted
            assert reason in view.reason
        assert (await scene.controller.status()).migration.target_version == 1

    play(act)


# --- drain and pause ----------------------------------------------------------------------------------------------


def test_a_shard_that_is_drained_hands_on_and_stays_until_it_is_told_back(play: Play) -> None:
    async def act(scene: Scene) -> None:
        shards = await scene.start()
        assert await scene.client.drain(2, False, timeout_s=5) == ""
        assert (await scene.controller.status()).shards[2].state == "draining"
        await scene.settle(("r",))
        assert not shards[2].held_LE.any()
        assert (await scene.controller.status()).complete
        view = await scene.client.apply(Placement.linear(LAYERS, EXPERTS, 3), False, timeout_s=5)
        assert "rank 2; shards take them at [0, 1]" in view.reason
        assert await scene.client.drain(2, True, timeout_s=5) == ""
        await scene.settle(("r",))
        assert shards[2].held_LE.any()
        assert (await scene.controller.status()).shards[2].state == "serving"

    play(act)


def test_a_drain_that_cannot_be_is_refused_with_the_reason(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await scene.start()
        assert "no shard serves at rank 3; there are [0, 1, 2]" in await scene.controller.drain(3)
        assert await scene.controller.drain(2) == ""
        reason = await scene.controller.drain(1)
        assert "without rank 1, 1 shards have 4 slots in a layer for 6 experts" in reason
        scene.mesh.roster.at(0).draining = "stops"
        assert "stops" in await scene.controller.drain(0, True)

    play(act)


def test_a_pause_holds_every_move_until_it_ends(play: Play) -> None:
    async def act(scene: Scene) -> None:
        shards = await scene.start()
        await scene.client.pause(True, timeout_s=5)
        await scene.client.apply(SHIFTED, False, timeout_s=5)
        for _ in range(3):
            await scene.seconds(1, "s0", "s1", "s2")
            assert [await shard.work() for shard in shards] == [False] * 3
        migration = (await scene.controller.status()).migration
        assert (migration.paused, migration.moving, migration.copies) == (True, True, 0)
        await scene.client.pause(False, timeout_s=5)
        await scene.settle(("r",))
        migration = (await scene.controller.status()).migration
        assert (migration.paused, migration.moving, migration.copies) == (False, False, 2 * LAYERS)

    play(act)


def test_a_report_of_a_stranger_is_turned_away(play: Play) -> None:
    async def act(scene: Scene) -> None:
        from cluster.mesh.messages import CopyReport

        await scene.start()
        report: Any = CopyReport("stranger", np.ones((LAYERS, EXPERTS), np.bool_), ())
        assert not await scene.controller.report(report)
        assert (await scene.controller.status()).migration.sole_copies == LAYERS * EXPERTS

    play(act)
