"""What routers report, and what people see of the autopilot. Ray pickles these between processes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ObservationReport:
    """What a router observed since its last report. The same report may come twice; its number tells."""

    router_id: str
    number: int  # counts up in one life of a router
    packed: bytes  # `Observation.to_bytes`; empty: the router only asks what is wanted


@dataclass(frozen=True)
class ObservationWish:
    """The controller's answer: how to go on."""

    wanted: bool
    period_s: float  # until the next report, or the next question


@dataclass(frozen=True)
class Decision:
    """One plan, and what became of it. Gains are shares of the step cost that the experts' placement decides about."""

    number: int
    at: float  # seconds since 1970
    kind: str  # plan or undo
    why: str
    outcome: str  # advised, left, failed, moving, measuring, helped, no difference, worse, undone or replaced
    target_version: int = 0  # 0: nothing was moved
    drift: float | None = None  # excess that led to it; None: the traffic was never planned for
    predicted_gain: float = 0.0
    predicted_noise: float = 0.0  # standard error
    measured_gain: float | None = None  # on traffic after the move: the placement before against the one after
    measured_noise: float | None = None
    copies: int = 0
    size_bytes: int = 0
    cost_s: float = 0.0  # of serving time, for the move
    saved_s: float = 0.0  # of serving time in horizon_s, predicted

    def to_dict(self) -> dict[str, Any]:
        """Plain data with these fields as keys."""
        return asdict(self)


@dataclass(frozen=True)
class WindowView:
    """The last window that was judged."""

    seconds: float
    steps: int
    tokens: dict[str, int]  # by phase
    sampled_tokens: int
    fan_out: float  # shards a token visits in a layer
    balancedness: float  # mean over largest load of a shard, in a step and layer
    step_cost_us: float  # predicted from the routing: the part of a step that the placement decides about
    drift: float | None  # excess over the cost planned for; None: nothing was planned for it
    drift_noise: float | None
    # Predicted, where shards offload; None elsewhere.
    found: float | None = None  # share of the experts that are in a shard's memory when they are asked for
    copy_cost_us: float | None = None  # part of step_cost_us: waiting for the others


@dataclass(frozen=True)
class AutopilotCounters:
    """Since the controller started."""

    reports: int = 0
    tokens: int = 0
    windows: int = 0
    plans: int = 0
    moves: int = 0
    undone: int = 0
    failures: int = 0  # of its background process


@dataclass(frozen=True)
class AutopilotView:
    """What the autopilot does, and would do."""

    mode: str = "off"
    state: str = "off"  # off, preparing, frozen, observing, judging, planning, moving, measuring or cooling down
    frozen: str = ""  # why nothing is planned and moved for now, one line
    routers: int = 0  # that reported in the last windows
    drifting: int = 0  # windows running whose drift is beyond noise
    cool_down_left_s: float = 0.0
    window: WindowView | None = None  # None before the first
    last: Decision | None = None  # the newest decision; with mode advise what it would do
    problem: str = ""  # why it does not get on, one line
    counters: AutopilotCounters = field(default_factory=AutopilotCounters)

    def to_dict(self) -> dict[str, Any]:
        """Plain data with these fields as keys."""
        return asdict(self)
