"""What a router answers to the console. Its status is `experts.protocol.status.RouterStatus`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TraceSample:
    """The routing decisions that one router sampled."""

    router_id: str
    npz: bytes | None  # an .npz file; empty if nothing was recorded yet, None if routers.trace_tokens is 0
