"""What a router answers to the console. Its status is `experts.protocol.status.RouterStatus`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cluster.autoscaling.pulse import Pulse
from experts.protocol.status import RouterStatus


@dataclass(frozen=True)
class TraceSample:
    """The routing decisions that one router sampled."""

    router_id: str
    npz: bytes | None  # an .npz file; empty if nothing was recorded yet, None if routers.trace_tokens is 0


@dataclass(frozen=True)
class RouterLive:
    """What the live page shows of one router."""

    status: RouterStatus
    pulse: Pulse
    loads: dict[str, Any] | None  # as `StepRecorder.loads`; None if they were not asked for
