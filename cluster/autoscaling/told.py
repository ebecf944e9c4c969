"""What routers tell the controller of their pace, and what it tells routers and shards for their statistics.

Serve's autoscaler sees the statistics of one deployment and none of its settings. So the controller tells shards what
routers measured, and both what the section `scaling` says: a change of it restarts nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cluster.config.scaling_section import ScalingSection

SILENT_AFTER_S = 15.0  # a router that has not told its pace for so long has none


@dataclass(frozen=True)
class Pace:
    """How fast tokens come, over the last seconds: of one router, or of all."""

    steps_per_s: float = 0.0  # that dispatched rows
    step_ms: float = 0.0  # mean time per output token; 0: none came
    wait_ms: float = 0.0  # of a step, for shards


@dataclass(frozen=True)
class ScalingFacts:
    """What the policies need and a replica does not know by itself."""

    settings: ScalingSection
    pace: Pace  # of all routers that generate
    routers: int  # that generate
    experts: int  # of a layer
    copies: int  # of each expert, as `placement.min_replicas`
    spare_slots: int  # of a layer and shard
    moving: bool  # experts move, or a shard is awaited


class Paces:
    """What each router told last. Times are seconds on any monotonic clock that the caller reads."""

    def __init__(self) -> None:
        self._paces: dict[str, tuple[Pace, float]] = {}

    def note(self, router_id: str, pace: Pace, now_s: float) -> None:
        """A router tells its pace."""
        self._paces[router_id] = (pace, now_s)

    def generating(self, now_s: float) -> list[Pace]:
        """Paces of the routers that generate; silent ones are forgotten."""
        self._paces = {name: kept for name, kept in self._paces.items() if now_s - kept[1] <= SILENT_AFTER_S}
        return [pace for pace, _ in self._paces.values() if pace.steps_per_s > 0]


def mean_pace(paces: Iterable[Pace]) -> Pace:
    """All steps; the times are means over them."""
    paces = list(paces)
    steps = sum(pace.steps_per_s for pace in paces)
    if not steps:
        return Pace()
    step_ms, wait_ms = (
        sum(getattr(pace, name) * pace.steps_per_s for pace in paces) / steps for name in ("step_ms", "wait_ms")
    )
    return Pace(steps, step_ms, wait_ms)
