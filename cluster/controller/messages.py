"""What shards, routers and people ask the placement controller, and what it answers.

Ray pickles these between processes. `to_dict` gives the JSON that people see.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from experts.protocol.membership import Membership, ShardEndpoint
from experts.protocol.status import ShardStatus
from placement.placement import Placement


@dataclass(frozen=True)
class JoinRequest:
    """A shard that holds no experts yet asks for a rank."""

    shard_id: str
    node_id: str
    serve_rank: int  # the rank that Serve gave the replica
    loading: int | None = None  # the rank it already loads, if the controller restarted meanwhile: that one or none


@dataclass(frozen=True)
class JoinAnswer:
    """A rank and what to load for it, or why there is none."""

    rank: int | None
    reason: str  # empty with a rank
    epoch: int
    placement: Placement | None  # None without a rank


@dataclass(frozen=True)
class RejoinRequest:
    """A shard that serves introduces itself to a controller that does not know it."""

    shard_id: str
    node_id: str
    endpoint: ShardEndpoint
    epoch: int  # the highest it has heard of
    placement_digest: str  # of the placement it holds
    serve_rank: int


@dataclass(frozen=True)
class HeartbeatAnswer:
    """Reply to a sign of life."""

    known: bool  # False: the shard has no seat and must join or rejoin
    epoch: int


@dataclass(frozen=True)
class MembershipRequest:
    """A router's long poll."""

    router_id: str
    term: str  # the life of the controller that gave out `epoch`; empty before the first
    epoch: int  # that the router is at; -1 before the first
    lost: dict[int, str]  # incarnation of each shard the router has given up, by rank
    wait_s: float  # answer by then, with or without news


@dataclass(frozen=True)
class MembershipAnswer:
    """The membership to move to, or None if there is no news."""

    term: str
    membership: Membership | None
    waiting_for: list[int]  # ranks at which no shard serves; empty with a membership


@dataclass(frozen=True)
class RouterView:
    """A router as the controller knows it."""

    epoch: int
    lost: dict[int, str]  # incarnation of each shard it has given up, by rank
    silent_s: float  # since its last poll began


@dataclass(frozen=True)
class SeatView:
    """A shard as the controller knows it."""

    shard_id: str
    node_id: str
    rank: int
    serving: bool  # False while it loads
    silent_s: float  # since its last sign of life
    pid: int | None  # None while it loads
    status: ShardStatus | None  # of its last heartbeat; None before the first

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the status' keys stand among the seat's own."""
        seat = asdict(self)
        del seat["status"]
        return {**seat, **(self.status.to_dict() if self.status is not None else {})}


@dataclass(frozen=True)
class ControllerStatus:
    """Who is where."""

    term: str  # names this life of the controller
    epoch: int
    complete: bool  # every rank is served
    missing_ranks: list[int]
    num_ranks: int
    placement_digest: str
    routers: dict[str, RouterView]  # by router id
    shards: list[SeatView]  # by rank

    def to_dict(self) -> dict[str, Any]:
        """Plain data with these fields as keys."""
        return {**asdict(self), "shards": [shard.to_dict() for shard in self.shards]}


@dataclass(frozen=True)
class PlacementView:
    """The placement and what it means."""

    epoch: int
    digest: str
    placement: Placement
    experts_of_rank: list[list[list[int]]]  # logical experts, ascending, by rank and layer

    def to_dict(self) -> dict[str, Any]:
        """Plain data with these fields as keys."""
        return {
            "epoch": self.epoch,
            "digest": self.digest,
            "placement": self.placement.to_json(),
            "experts_of_rank": self.experts_of_rank,
        }
