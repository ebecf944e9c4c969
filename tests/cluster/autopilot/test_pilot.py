"""The loop's decisions, with a made-up judge and planner, and a clock that the tests move."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from cluster.autopilot.estimates import Estimate, Prices
from cluster.autopilot.jobs import JudgeJob, Model, PlanJob, Proposal, Verdict
from cluster.autopilot.pilot import MOST_WINDOWS, Change, Facts, Pilot
from cluster.config.autopilot_section import AutopilotSection
from placement.placement import Placement
from placement.traces.observation import Observation, SampledStep

LAYERS, EXPERTS = 1, 4
BEFORE, BETTER = Placement(2, 1, EXPERTS, np.array([[0, 1, 2, 3]])), Placement(2, 1, EXPERTS, np.array([[0, 2, 1, 3]]))
FACTS = Facts(
    *(0.0, 0.0, 1, BEFORE, False, ""),
    model=Model(1000, 2.0, 4000, "cpu"),
    slots_per_rank=2,
    min_replicas=1,
    load_cap=1.05,
    fresh_s=0.0,
    bytes_per_s=1e6,
)
SURE_GAIN = Estimate(0.10, 0.01)


def traffic(expert: int = 0, steps: int = 20) -> Observation:
    """Steps of one token, all of it of one expert."""
    counts_PLE = np.zeros((2, LAYERS, EXPERTS), np.int64)
    counts_PLE[0, 0, expert] = steps
    ids = np.full((1, LAYERS, 1), expert, np.int16)
    sampled = tuple(SampledStep(n, float(n), 1, ids, np.zeros(1, bool)) for n in range(steps))
    return Observation((0,), counts_PLE, np.array([steps, 0]), steps, sampled)


def prices(seconds: float, steps: int = 20) -> Prices:
    """Steps of that cost, but for a thousandth."""
    wobble_S = 1 + 0.001 * (-1.0) ** np.arange(steps)
    return Prices(seconds * wobble_S[:, None], np.ones(steps), np.ones(steps), np.ones(steps))


@dataclass
class Scene:
    """One pilot and its mesh."""

    section: AutopilotSection = field(default_factory=lambda: AutopilotSection(
        mode="auto", window_s=10, horizon_s=1000, cool_down_s=100, min_window_tokens=1
    ))  # fmt: skip
    now_s: float = 0.0
    facts: Facts = FACTS
    reports: int = 0

    def __post_init__(self) -> None:
        self.pilot = Pilot()
        self.pilot.configure(self.section)

    @property
    def at(self) -> Facts:
        return replace(self.facts, now_s=self.now_s, now=1000 + self.now_s)

    def window(self, expert: int = 0) -> JudgeJob | None:
        """A window of traffic passes."""
        self.pilot.next_job(self.at)
        self.reports += 1
        self.pilot.traffic.add("r", self.reports, traffic(expert), self.now_s)
        self.now_s += 10
        return self.pilot.next_job(self.at)

    def judge(self, *seconds: float, planned: float | None = None, expert: int = 0) -> Any:
        """A window passes in which the placements cost so much."""
        job = self.window(expert)
        assert job is not None
        assert len(job.placements) == len(seconds)
        assert (job.reference is None) == (planned is None)
        verdict = Verdict(tuple(map(prices, seconds)), None if planned is None else prices(planned))
        return self.pilot.judged(verdict, self.at)

    def propose(self, gain: Estimate = SURE_GAIN, copies: int = 2, price_s: float = 0.001) -> Change | None:
        proposal = Proposal(BETTER if copies else BEFORE, copies, gain, 1e-3)
        return self.pilot.proposed(proposal, self.at, price_s, 1000 * copies)

    def carry_out(self, change: Change) -> None:
        self.facts = replace(self.facts, target_version=self.facts.target_version + 1, placement=change.placement)
        self.pilot.begun(self.facts.target_version, self.at)

    def moved(self) -> None:
        """A plan for the first window was carried out and everything is where it should be."""
        assert isinstance(self.judge(1.0), PlanJob)
        change = self.propose()
        assert change is not None
        self.facts = replace(self.facts, moving=True)
        self.carry_out(change)
        assert self.window() is None
        assert self.last.outcome == "moving"
        self.facts = replace(self.facts, moving=False)

    @property
    def last(self) -> Any:
        return self.pilot.decisions[-1]

    @property
    def state(self) -> str:
        return self.pilot.view(self.at).state


def test_a_window_tells_what_copies_cost_where_shards_offload() -> None:
    scene = Scene()
    assert scene.window() is not None
    offloaded = replace(prices(1.0), found_S=np.tile([0.5, 1.0], 10), copy_S=np.tile([0.25, 0.75], 10))
    scene.pilot.judged(Verdict((offloaded,), None), scene.at)
    window = scene.pilot.view(scene.at).window
    assert window is not None
    assert (window.found, window.copy_cost_us) == (0.75, 0.5e6)


def test_what_was_never_planned_for_is_planned_after_one_window_and_measured() -> None:
    scene = Scene()
    scene.moved()
    assert scene.judge(0.9, 1.0) is None  # now, before
    assert scene.last.outcome == "helped"
    assert scene.last.target_version == 2
    assert scene.last.measured_gain == pytest.approx(0.1)
    assert scene.state == "observing"
    assert scene.pilot.view(scene.at).counters.moves == 1


def test_drift_must_be_sure_and_come_twice_and_the_cool_down_be_over() -> None:
    scene = Scene()
    scene.moved()
    scene.judge(0.9, 1.0)
    moved_s = scene.now_s
    assert scene.judge(1.0, planned=0.9) is None  # once
    assert scene.judge(0.9, planned=0.9) is None  # not again
    assert scene.judge(1.0, planned=0.9) is None
    assert scene.judge(1.0, planned=0.9) is None, "twice, but it cools down"
    assert scene.state == "cooling down"
    scene.now_s = moved_s + 100
    assert isinstance(scene.judge(1.0, planned=0.9), PlanJob)
    assert scene.pilot.view(scene.at).window.drift == pytest.approx(1 / 9, rel=0.01)


def test_traffic_of_other_experts_is_planned_for_though_it_costs_no_more() -> None:
    scene = Scene()
    scene.moved()
    scene.judge(0.9, 1.0)
    scene.now_s += 1000
    assert scene.judge(0.8, planned=0.9) is None, "of the same experts"
    assert scene.judge(0.8, planned=0.9, expert=2) is None, "once"
    assert scene.judge(0.8, planned=0.9, expert=2) is None, "twice the same"
    job = scene.judge(0.8, planned=0.9, expert=2)
    assert isinstance(job, PlanJob)
    assert job.seen.counts_LE[0, 0] == 0, "planned for the new traffic alone"
    assert scene.propose(copies=0) is None
    scene.now_s += 1000
    for expert in (0, 1, 2, 3):
        assert scene.judge(0.8, planned=0.9, expert=expert) is None, "each window another: no mix to plan for"


def test_a_small_excess_is_no_drift() -> None:
    scene = Scene()
    scene.moved()
    scene.judge(0.9, 1.0)
    scene.now_s += 1000
    for _ in range(4):
        assert scene.judge(0.915, planned=0.9) is None  # surely more, and less than min_drift


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"gain": Estimate(0.10, 0.06)}, "not surely more"),
        ({"gain": Estimate(0.004, 0.0001)}, "not surely more"),
        ({"copies": 0}, "no better placement"),
    ],
)
def test_what_is_not_surely_worth_it_waits_for_more_traffic_and_in_the_end_that_is_taken_as_planned_for(
    told: Any, why: str
) -> None:
    scene = Scene()
    for windows in range(1, MOST_WINDOWS + 1):
        job = scene.judge(1.0)
        assert isinstance(job, PlanJob)
        assert job.seen.steps == 20 * windows
        assert scene.propose(**told) is None
        assert scene.last.outcome == "left"
        assert why in scene.last.why
        scene.now_s += 100
    assert scene.judge(1.0, planned=1.0) is None


def test_a_move_that_costs_more_than_the_horizon_saves_is_left() -> None:
    scene = Scene(AutopilotSection(mode="auto", window_s=10, horizon_s=1, min_window_tokens=1))
    assert isinstance(scene.judge(1.0), PlanJob)
    # 2 steps a second for 1 s, of 1 ms each: 0.2 ms are saved, and 15 % of 2 ms lost.
    assert scene.propose(price_s=100.0) is None
    assert "its move costs" in scene.last.why
    assert scene.judge(1.0, planned=1.0) is None, "more of this traffic would change nothing"


def test_what_made_things_worse_is_undone_once_and_not_tried_for_the_same_traffic() -> None:
    scene = Scene()
    scene.moved()
    undo = scene.judge(1.2, 1.0)
    assert isinstance(undo, Change)
    assert undo.placement is BEFORE
    assert [each.outcome for each in scene.pilot.decisions] == ["worse", "moving"]
    scene.carry_out(undo)
    assert scene.judge(1.0, 1.2) is None
    assert scene.last.outcome == "undone"
    assert scene.pilot.view(scene.at).counters.undone == 1
    scene.now_s += 1000
    for expert, outcome in ((0, "left"), (3, "moving")):
        scene.judge(1.2, planned=1.0, expert=expert)
        assert isinstance(scene.judge(1.2, planned=1.0, expert=expert), PlanJob)
        change = scene.propose()
        assert scene.last.outcome == outcome
        assert (change is None) == (outcome == "left")
        scene.now_s += 1000


def test_an_undo_that_seems_worse_is_not_undone() -> None:
    scene = Scene()
    scene.moved()
    scene.carry_out(scene.judge(1.2, 1.0))
    assert scene.judge(1.5, 1.0) is None
    assert scene.state == "observing"


def test_advice_is_told_and_not_followed_until_the_mode_is_auto() -> None:
    scene = Scene()
    scene.pilot.configure(scene.section.model_copy(update={"mode": "advise"}))
    assert isinstance(scene.judge(1.0), PlanJob)
    assert scene.propose() is None
    assert scene.last.outcome == "advised"
    assert scene.pilot.view(scene.at).last.predicted_gain == pytest.approx(0.1)
    scene.pilot.configure(scene.section)
    assert isinstance(scene.judge(1.0), PlanJob)
    assert scene.propose() is not None


def test_nothing_is_judged_while_frozen_or_off() -> None:
    scene = Scene()
    scene.facts = replace(FACTS, frozen="rank 1 drains")
    assert scene.window() is None
    assert scene.state == "frozen"
    scene.facts = FACTS
    scene.now_s += 100
    assert scene.pilot.next_job(scene.at) is None, "what came meanwhile is dropped"
    assert isinstance(scene.judge(1.0), PlanJob)
    scene.facts = replace(FACTS, frozen="migration is paused")
    assert scene.propose() is None, "frozen while it was planned"
    off = Scene(AutopilotSection())
    assert off.window() is None
    assert off.state == "off"


def test_a_target_that_others_set_ends_what_was_begun() -> None:
    scene = Scene()
    scene.moved()
    scene.facts = replace(scene.facts, target_version=7)
    scene.now_s += 100
    assert isinstance(scene.judge(1.0), PlanJob)
    assert scene.last.outcome == "replaced"
    scene.facts = replace(scene.facts, target_version=8)
    assert scene.propose() is None, "it was planned for another target"
    assert len(scene.pilot.decisions) == 1


def test_bytes_a_minute_bound_a_plan() -> None:
    section = AutopilotSection(mode="auto", window_s=10, cool_down_s=120, max_bytes_per_min=2500, min_window_tokens=1)
    job = Scene(section).judge(1.0)
    assert isinstance(job, PlanJob)
    assert job.max_copies == 5  # of 1,000 bytes, in two minutes


def test_a_plan_that_fits_the_shards_no_more_is_told_and_not_measured() -> None:
    scene = Scene()
    scene.judge(1.0)
    assert scene.propose() is not None
    scene.pilot.failed("rank 1 has 3 slots", scene.at)
    assert (scene.last.outcome, scene.state) == ("failed", "cooling down")
    scene.now_s += 100
    assert isinstance(scene.judge(1.0), PlanJob)


def test_a_job_without_a_result_is_told_and_tried_again_later() -> None:
    scene = Scene()
    assert scene.window() is not None
    scene.pilot.failed("its process ended", scene.at)
    view = scene.pilot.view(scene.at)
    assert (view.problem, view.counters.failures) == ("its process ended", 1)
    assert scene.judge(1.0) is None, "it cools down"
    scene.now_s += 100
    assert isinstance(scene.judge(1.0), PlanJob)
