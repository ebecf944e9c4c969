"""The loop's state and decisions: drift, plans, what came of them. Without Ray, a process or a clock of its own.

    observing -> (drift, twice) -> planning -> worth it? -> moving -> measuring -> helped | worse -> undone once

The shell asks for a job (`next_job`), runs it, and hands back what came (`judged`, `proposed`). It never waits here.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np

from cluster.autopilot.estimates import SURE, Estimate, distance, excess, saving
from cluster.autopilot.jobs import JudgeJob, Model, PlanJob, Proposal, Verdict
from cluster.autopilot.messages import AutopilotCounters, AutopilotView, Decision, WindowView
from cluster.autopilot.traffic import REMEMBERED_WINDOWS, Traffic, Window, pooled, shares_of
from cluster.config.autopilot_section import AutopilotSection
from placement.placement import Placement
from placement.traces.observation import PHASES, Observation

TWICE = 2  # windows running whose drift is beyond noise
MOST_WINDOWS = REMEMBERED_WINDOWS  # that a plan is made for; with so many, what it does not find is not there
OTHER_TRAFFIC = 0.05  # distance of mixes that calls for a plan, and lets one that did harm be tried again
MOVE_SLOWDOWN = 0.15  # how much longer steps take while experts move: at most what docs/benchmarks.md measured
LONGEST_HISTORY = 200


@dataclass(frozen=True, eq=False)
class Facts:
    """The mesh at a moment. `frozen`: why nothing may be planned and moved, empty if it may."""

    now_s: float
    now: float  # seconds since 1970, for people
    target_version: int
    placement: Placement | None  # the target
    moving: bool
    frozen: str
    model: Model
    slots_per_rank: int  # usable for plans: without spare ones
    min_replicas: int
    load_cap: float
    fresh_s: float  # time for a plan from nothing
    bytes_per_s: float  # of a move


@dataclass(frozen=True, eq=False)
class Change:
    """A target to set, and the decision that it is."""

    placement: Placement
    origin: str


@dataclass(eq=False)
class _Move:
    """What was carried out and is not judged yet."""

    version: int
    before: Placement
    shares_LE: np.ndarray  # of the traffic that it was planned for
    reached: bool = False
    undoing: bool = False


@dataclass
class Pilot:
    """One mesh's autopilot."""

    section: AutopilotSection = field(default_factory=AutopilotSection)
    traffic: Traffic = field(default_factory=Traffic)
    decisions: deque[Decision] = field(default_factory=lambda: deque(maxlen=LONGEST_HISTORY))
    problem: str = ""
    counters: AutopilotCounters = field(default_factory=AutopilotCounters)
    reference: Observation | None = None
    """Traffic that the target was last planned or found right for; None: it was not."""
    window: WindowView | None = None
    drift: Estimate | None = None
    _drifting: list[Window] = field(default_factory=list)
    _version: int = 0  # of the target that all this is about
    _move: _Move | None = None
    _not_before_s: float = float("-inf")
    _failed: list[np.ndarray] = field(default_factory=list)  # mixes whose plans did harm, float64 [L, E] each
    _busy: str = ""  # judging or planning
    _job: tuple[Window, int, int] | None = None  # what is judged: window, target version, number of placements

    def configure(self, section: AutopilotSection) -> None:
        """Take on other settings. What was left by the ones before is looked at again."""
        if section != self.section:
            self.section, self.reference, self._not_before_s = section, None, float("-inf")

    # Jobs -------------------------------------------------------------------------------------------------------------

    def next_job(self, facts: Facts) -> JudgeJob | None:
        """Called again and again while no job runs: what to price next, if a window is over."""
        if self.section.mode == "off" or facts.placement is None or self._busy:
            return None
        self._follow_target(facts)
        move = self._move
        if move is not None and not move.reached:
            if facts.moving:
                return None
            move.reached = True
            self.traffic.restart(facts.now_s)  # from here on it is traffic of the new placement alone
            self._note_last(outcome="measuring")
        if facts.frozen:
            self.traffic.restart(facts.now_s)
            self._drifting.clear()
            return None
        window = self.traffic.close(facts.now_s, self.section.window_s, self.section.min_window_tokens)
        if window is None:
            return None
        before = () if move is None else (move.before,)
        job = JudgeJob(facts.model, (facts.placement, *before), window.seen, self.reference)
        self._busy, self._job = "judging", (window, facts.target_version, len(job.placements))
        return job

    def judged(self, verdict: Verdict, facts: Facts) -> PlanJob | Change | None:
        """What to do about a window: plan, go back, or nothing."""
        assert self._job is not None, "a verdict is of a job"
        window, version, num_placements = self._job
        self._busy, self._job, self.problem = "", None, ""
        self._count(windows=1)
        self._follow_target(facts)
        if version != facts.target_version or facts.placement is None:
            return None
        self._look_at(window, verdict)
        if self._move is not None:
            return self._measured(window, verdict, facts) if num_placements > 1 else None
        return self._plan_if_due(window, facts)

    def proposed(self, proposal: Proposal, facts: Facts, price_s: float, size_bytes: int) -> Change | None:
        """Whether to carry out a plan. `price_s`: how long the move takes; `size_bytes`: what it moves."""
        self._busy, self.problem = "", ""
        self._count(plans=1)
        self._follow_target(facts)
        seen = pooled(self._drifting) if self._drifting else None
        mix_LE = self._drifting[-1].shares_LE if self._drifting else None
        steps = self._steps_in_horizon()
        self._not_before_s = facts.now_s + self.section.cool_down_s
        if seen is None or mix_LE is None or facts.placement is None or facts.frozen or facts.moving:
            return None  # things changed meanwhile, and what was planned is for others
        gain = proposal.gain
        saved_s = gain.value * proposal.step_s * steps
        cost_s = MOVE_SLOWDOWN * min(price_s, proposal.step_s * steps)
        why_not, final = self._why_not(proposal, saved_s, cost_s, mix_LE)
        decision = self._decide(
            facts,
            kind="plan",
            why=why_not or "what it saves is more than its move costs",
            outcome="left" if why_not else "advised" if self.section.mode == "advise" else "moving",
            drift=None if self.drift is None else self.drift.value,
            predicted_gain=gain.value,
            predicted_noise=gain.noise,
            copies=proposal.copies,
            size_bytes=size_bytes,
            cost_s=cost_s,
            saved_s=saved_s,
        )
        if decision.outcome == "left" and (final or len(self._drifting) >= MOST_WINDOWS):
            # Nothing better is known for this traffic: it is what the placement is for. With less traffic, the next
            # plan is made for these windows and those to come.
            self.reference = seen
            self._drifting.clear()
        if decision.outcome != "moving":
            return None
        self._move = _Move(0, facts.placement, mix_LE)
        return Change(proposal.placement, f"autopilot: saves {gain.value:.1%} of step cost")

    def failed(self, reason: str, facts: Facts) -> None:
        """A job has no result."""
        self._busy, self._job, self.problem = "", None, reason
        if self._move is not None and not self._move.version:  # decided, and refused by the mesh
            self._move = None
            self._note_last(outcome="failed")
        self._count(failures=1)
        self._not_before_s = facts.now_s + self.section.cool_down_s

    def begun(self, version: int, facts: Facts) -> None:
        """The change became the target of that version."""
        assert self._move is not None, "what begins was decided"
        self._move.version = self._version = version
        self._drifting.clear()
        self.reference = None
        self._count(undone=1) if self._move.undoing else self._count(moves=1)
        self._note_last(target_version=version)

    # ------------------------------------------------------------------------------------------------------------------

    def _follow_target(self, facts: Facts) -> None:
        """Somebody else may have set a target: a command, the config, shards that came or went."""
        if facts.target_version == self._version:
            return
        if self._move is not None:
            self._note_last(outcome="replaced")
        self._version, self._move, self.reference, self.drift = facts.target_version, None, None, None
        self._drifting.clear()
        self.traffic.restart(facts.now_s)

    def _look_at(self, window: Window, verdict: Verdict) -> None:
        measured = verdict.prices[0]
        self.drift = None if verdict.planned is None else excess(measured, verdict.planned, verdict.reuse)
        self.window = WindowView(
            seconds=window.seconds,
            steps=window.seen.steps,
            tokens=dict(zip(PHASES, window.seen.tokens_P.tolist(), strict=True)),
            sampled_tokens=window.seen.sampled_tokens,
            fan_out=measured.mean("fan_out_S"),
            balancedness=measured.mean("balancedness_S"),
            step_cost_us=measured.mean() * 1e6,
            drift=None if self.drift is None else self.drift.value,
            drift_noise=None if self.drift is None else _finite(self.drift.noise),
            found=None if measured.found_S is None else measured.mean("found_S"),
            copy_cost_us=None if measured.copy_S is None else measured.mean("copy_S") * 1e6,
        )

    def _plan_if_due(self, window: Window, facts: Facts) -> PlanJob | None:
        drifts = self.drift is None or self.drift.surely_above > self.section.min_drift
        if not drifts and not self._mix_changed():
            self._drifting.clear()
            return None
        self._drifting = [*self._drifting, window][-MOST_WINDOWS:]
        enough = 1 if self.drift is None else TWICE
        if len(self._drifting) < enough or facts.now_s < self._not_before_s or facts.frozen or facts.moving:
            return None
        assert facts.placement is not None
        self._busy = "planning"
        expert_s = facts.model.expert_bytes / facts.bytes_per_s
        return PlanJob(
            model=facts.model,
            current=facts.placement,
            seen=pooled(self._drifting),
            slots_per_rank=facts.slots_per_rank,
            min_replicas=facts.min_replicas,
            load_cap=facts.load_cap,
            copy_s=MOVE_SLOWDOWN * expert_s / max(facts.placement.num_ranks, 1),
            steps=self._steps_in_horizon(),
            max_copies=self._most_copies(facts.model.expert_bytes),
            fresh_s=facts.fresh_s,
        )

    def _mix_changed(self) -> bool:
        """Whether other experts are asked for than the target was planned for.

        Traffic that costs no more than what was planned for may still have a better placement. The distance of two
        windows running is what chance alone makes of one mix; a change between them looks like chance, once.
        """
        if self.reference is None or len(self.traffic.windows) < TWICE:
            return False
        before, last = list(self.traffic.windows)[-TWICE:]
        from_planned = distance(shares_of(self.reference), last.shares_LE)
        return from_planned > OTHER_TRAFFIC + TWICE * distance(before.shares_LE, last.shares_LE)

    def _why_not(self, proposal: Proposal, saved_s: float, cost_s: float, mix_LE: np.ndarray) -> tuple[str, bool]:
        """Why a plan is left, "" if it is not; and whether more of the same traffic would change nothing."""
        if not proposal.copies:
            return "no better placement is known for this traffic", False
        if proposal.gain.surely_above < self.section.min_gain:
            gain = proposal.gain
            return (
                f"it saves {gain.value:.1%} +- {gain.noise:.1%} of the step cost, which is not surely more than "
                f"autopilot.min_gain, {self.section.min_gain:.1%}"
            ), False
        if saved_s <= cost_s:
            return f"in horizon_s it saves {saved_s:.3g} s of serving, and its move costs {cost_s:.3g} s", True
        if any(mix.shape == mix_LE.shape and distance(mix, mix_LE) < OTHER_TRAFFIC for mix in self._failed):
            return "a plan for this traffic made things worse before", True
        return "", True

    def _measured(self, window: Window, verdict: Verdict, facts: Facts) -> Change | None:
        """Both placements on the traffic after the move."""
        move = self._move
        assert move is not None, "only a move is measured"
        now, before = verdict.prices
        gain = saving(before, now)
        sure = abs(gain.value) > SURE * gain.noise
        self._not_before_s = facts.now_s + self.section.cool_down_s
        self._move, self.reference = None, window.seen
        worse = sure and gain.value < 0
        outcome = "undone" if move.undoing else "worse" if worse else "helped" if sure else "no difference"
        self._note_last(outcome=outcome, measured_gain=gain.value, measured_noise=_finite(gain.noise))
        if not worse or move.undoing:
            return None
        self._failed.append(move.shares_LE)
        if facts.frozen or self.section.mode != "auto":
            return None
        self._decide(facts, kind="undo", why="the plan before made things worse", outcome="moving",
                     predicted_gain=-gain.value, predicted_noise=gain.noise)  # fmt: skip
        assert facts.placement is not None
        self._move = _Move(0, facts.placement, window.shares_LE, undoing=True)
        return Change(move.before, "autopilot: undoes a plan that made things worse")

    def _steps_in_horizon(self) -> float:
        windows = list(self.traffic.windows)[-2:]
        seconds = sum(window.seconds for window in windows)
        return sum(window.seen.steps for window in windows) / max(seconds, 1e-9) * self.section.horizon_s

    def _most_copies(self, expert_bytes: int) -> int | None:
        limit = self.section.max_bytes_per_min
        if limit is None:
            return None
        return int(limit * max(self.section.cool_down_s, self.section.window_s) / 60 / max(expert_bytes, 1))

    def _decide(self, facts: Facts, **what: object) -> Decision:
        number = self.decisions[-1].number + 1 if self.decisions else 1
        decision = Decision(number, facts.now, **what)  # type: ignore[arg-type]
        self.decisions.append(decision)
        return decision

    def _note_last(self, **what: object) -> None:
        if self.decisions:
            self.decisions[-1] = replace(self.decisions[-1], **what)  # type: ignore[arg-type]

    def _count(self, **more: int) -> None:
        self.counters = replace(
            self.counters, **{name: getattr(self.counters, name) + count for name, count in more.items()}
        )

    # Seen -------------------------------------------------------------------------------------------------------------

    def view(self, facts: Facts) -> AutopilotView:
        """For people."""
        left_s = max(self._not_before_s - facts.now_s, 0.0)
        return AutopilotView(
            mode=self.section.mode,
            state=self._state(facts, left_s),
            frozen=facts.frozen,
            routers=self.traffic.routers(facts.now_s, 2 * self.section.window_s),
            drifting=len(self._drifting),
            cool_down_left_s=left_s,
            window=self.window,
            last=self.decisions[-1] if self.decisions else None,
            problem=self.problem,
            counters=replace(self.counters, reports=self.traffic.reports, tokens=self.traffic.tokens),
        )

    def _state(self, facts: Facts, left_s: float) -> str:
        if self.section.mode == "off":
            return "off"
        if self._move is not None:
            return "measuring" if self._move.reached else "moving"
        if facts.frozen:
            return "frozen"
        return self._busy or ("cooling down" if left_s and self._drifting else "observing")


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
