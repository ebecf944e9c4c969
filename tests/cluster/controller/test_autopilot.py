"""The autopilot in the controller, with shards and routers of a scene and a made-up judge and planner."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cluster.autopilot.background import JobError
from cluster.autopilot.estimates import Estimate, Prices
from cluster.autopilot.jobs import Job, JudgeJob, Model, Prepared, PrepareJob, Proposal, Result, Verdict
from cluster.autopilot.messages import ObservationReport, ObservationWish
from cluster.controller.autopilot import ASK_AGAIN_S
from cluster.mesh.holdings import experts_by_rank
from experts.protocol.status import OffloadStatus
from placement.capacity.residency import Offload
from placement.placement import Placement
from placement.traces.observation import Observation, SampledStep
from tests.support.controller_scene import EXPERTS, LAYERS, LIVE, SLOTS, Play, Scene, turns
from tests.support.serve.statuses import shard_status

SHIFTED = Placement(3, 1, EXPERTS, np.array([[0, 3, 2, 1, 4, 5]] * LAYERS, np.int32))  # 1 and 3 change places
SECTION = {"mode": "auto", "window_s": 4, "cool_down_s": 1, "min_window_tokens": 1, "horizon_s": 10_000}
BEATING = ("s0", "s1", "s2")


class MadeUp:
    """In place of the process: the first placement of a job costs 1 ms a step, further ones 1.2 ms."""

    def __init__(self, fails: bool = False) -> None:
        self.jobs: list[str] = []
        self.models: list[Model] = []
        self.process: Any = None
        self.fails = fails

    async def run(self, job: Job, timeout_s: float) -> Result:
        self.jobs.append(type(job).__name__)
        self.process = object()
        if self.fails:
            raise JobError("its process ended")
        if isinstance(job, PrepareJob):
            return Prepared()
        self.models.append(job.model)
        if isinstance(job, JudgeJob):
            costs = [1e-3] + [1.2e-3] * (len(job.placements) - 1)
            return Verdict(tuple(map(prices, costs)), None if job.reference is None else prices(1e-3))
        return Proposal(SHIFTED, 2 * LAYERS, Estimate(0.1, 0.01), 1e-3)

    async def stop(self) -> None:
        self.process = None


def prices(seconds: float) -> Prices:
    wobble_S = seconds * (1 + 0.001 * (-1.0) ** np.arange(20))
    return Prices(wobble_S[:, None], np.ones(20), np.ones(20), np.ones(20))


def report(number: int, layers: int = LAYERS) -> ObservationReport:
    counts_PLE = np.ones((2, layers, EXPERTS), np.int64)
    steps = tuple(
        SampledStep(n, float(n), 1, np.zeros((1, layers, 1), np.int16), np.zeros(1, np.bool_)) for n in range(20)
    )
    seen = Observation(tuple(range(layers)), counts_PLE, np.array([20, 0]), 20, steps)
    return ObservationReport("r", number, seen.to_bytes())


async def started(scene: Scene, fails: bool = False) -> MadeUp:
    """A mesh at rest whose autopilot is on."""
    await scene.start()
    await scene.settle(("r",))
    made_up = MadeUp(fails)
    scene.controller._autopilot._background = made_up
    await scene.controller.reconfigure({**LIVE, "autopilot": SECTION})
    await turns()
    return made_up


def test_traffic_is_judged_a_plan_carried_out_and_its_gain_measured(play: Play) -> None:
    async def act(scene: Scene) -> None:
        made_up = await started(scene)
        assert await scene.controller.observe(ObservationReport("r", 1, b"")) == ObservationWish(True, 1.0)
        await scene.seconds(1, *BEATING)
        for number in (2, 3):
            await scene.controller.observe(report(number))
            await scene.seconds(5, *BEATING)
            await scene.settle(("r",))
            assert scene.mesh.keeper.target.version == 2
        assert made_up.jobs == ["PrepareJob", "JudgeJob", "PlanJob", "JudgeJob"]
        [decision] = await scene.controller.decisions()
        assert (decision.outcome, decision.target_version, decision.copies) == ("helped", 2, 2 * LAYERS)
        assert abs(decision.measured_gain - 1 / 6) < 1e-3
        status = await scene.controller.status()
        assert status.migration.origin.startswith("autopilot: ")
        assert (status.autopilot.state, status.autopilot.counters.moves) == ("observing", 1)
        for shard in scene.shards.values():
            assert shard.held_LE[experts_by_rank(SHIFTED)[shard.rank]].all()

    play(act)


@pytest.mark.parametrize(
    ("changes", "rate", "foreseen"),
    [({}, 2e9, 0.7), ({"max_copy_bytes_per_s": 1e6}, 1e6, 0.7), ({"prefetch": False}, 2e9, 0.0)],
)
def test_plans_are_priced_by_what_shards_have_in_memory(
    play: Play, changes: dict[str, Any], rate: float, foreseen: float
) -> None:
    async def act(scene: Scene) -> None:
        scene.offload = {"resident_fraction": 0.5, **changes}
        await scene.restart()
        made_up = await started(scene)
        await scene.seconds(1, *BEATING)
        await scene.controller.observe(report(2))
        await scene.seconds(5, *BEATING)
        assert made_up.jobs == ["PrepareJob", "JudgeJob", "PlanJob"]
        assert {model.offload for model in made_up.models} == {Offload(0.5, rate, SLOTS, foreseen, layers_share=True)}

    play(act)


def test_copies_are_as_slow_as_those_of_the_slowest_shard_that_has_told(play: Play) -> None:
    async def act(scene: Scene) -> None:
        scene.offload = {"resident_fraction": 0.5}
        await scene.restart()
        made_up = await started(scene)
        for rank, rate in enumerate((0.0, 3e9, 5e8)):
            offload = OffloadStatus("native", 0, 0, 0, 0, 0, 0, 0.0, 0.0, 0, 0, copy_bytes_per_s=rate)
            await scene.controller.heartbeat(f"s{rank}", shard_status(rank, offload=offload))
        gone = OffloadStatus("native", 0, 0, 0, 0, 0, 0, 0.0, 0.0, 0, 0, copy_bytes_per_s=1.0)
        scene.controller._shard_status[3] = shard_status(3, offload=gone)
        await scene.seconds(1, *BEATING)
        await scene.controller.observe(report(2))
        await scene.seconds(5, *BEATING)
        assert {model.offload.copy_bytes_per_s for model in made_up.models} == {5e8}

    play(act)


@pytest.mark.parametrize("offload", [None, {"resident_fraction": 1}])
def test_shards_with_all_experts_in_memory_have_no_such_price(play: Play, offload: dict[str, Any] | None) -> None:
    async def act(scene: Scene) -> None:
        scene.offload = offload
        await scene.restart()
        made_up = await started(scene)
        await scene.seconds(1, *BEATING)
        await scene.controller.observe(report(2))
        await scene.seconds(5, *BEATING)
        assert [model.offload for model in made_up.models] == [None, None]

    play(act)


def test_off_wants_nothing_does_nothing_and_ends_the_process(play: Play) -> None:
    async def act(scene: Scene) -> None:
        made_up = await started(scene)
        await scene.seconds(1, *BEATING)
        assert made_up.process is not None
        await scene.controller.reconfigure(LIVE)
        assert await scene.controller.observe(report(1)) == ObservationWish(False, ASK_AGAIN_S)
        await scene.seconds(9, *BEATING)
        assert made_up.process is None
        assert made_up.jobs == ["PrepareJob"]
        status = await scene.controller.status()
        assert (status.autopilot.state, status.autopilot.counters.reports) == ("off", 0)

    play(act)


def test_reports_that_are_damaged_or_of_another_model_are_left_out(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await started(scene)
        for bad in (
            report(1, layers=LAYERS + 1),
            ObservationReport("r", 2, b"nothing"),
            ObservationReport("r", 3, b""),
        ):
            assert (await scene.controller.observe(bad)).wanted
        assert (await scene.controller.status()).autopilot.counters.reports == 0
        await scene.controller.observe(report(4))
        await scene.controller.observe(report(4))  # its answer was lost
        assert (await scene.controller.status()).autopilot.counters.reports == 1

    play(act)


def test_a_planner_that_fails_is_told_and_nothing_moves(play: Play) -> None:
    async def act(scene: Scene) -> None:
        await started(scene, fails=True)
        await scene.seconds(2, *BEATING)
        await scene.controller.observe(report(1))
        await scene.seconds(6, *BEATING)
        view = (await scene.controller.status()).autopilot
        assert (view.problem, view.counters.failures) == ("its process ended", 2)
        assert scene.mesh.keeper.target.version == 1

    play(act)


def test_it_keeps_still_while_a_shard_drains(play: Play) -> None:
    async def act(scene: Scene) -> None:
        made_up = await started(scene)
        await scene.seconds(1, *BEATING)
        assert await scene.controller.drain(2) == ""
        await scene.controller.observe(report(1))
        await scene.seconds(6, *BEATING)
        assert made_up.jobs == ["PrepareJob"]
        view = (await scene.controller.status()).autopilot
        assert (view.state, view.frozen) == ("frozen", "rank 2 drains")

    play(act)
