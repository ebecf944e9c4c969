"""What shards, routers and people ask the placement controller, and what it answers.

Ray pickles these between processes. `to_dict` gives the JSON that people see.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from cluster.autopilot.messages import AutopilotView, Decision
from cluster.autoscaling.told import ScalingFacts
from experts.protocol.membership import Membership, ShardEndpoint
from experts.protocol.orders import CopyOrder, CopyResult
from experts.protocol.status import ShardStatus
from placement.placement import Placement


@dataclass(frozen=True)
class JoinRequest:
    """A shard that holds no experts yet asks for a rank."""

    shard_id: str
    node_id: str
    serve_rank: int  # the rank that Serve gave the replica
    loading: int | None = None  # the rank it already has, if the controller restarted meanwhile: that one or none
    problem: str = ""  # why this shard ends, and why its successor would: what people have to change


@dataclass(frozen=True)
class Times:
    """Periods and time-outs that the controller sets for its shards, in seconds."""

    heartbeat_s: float
    lost_after_s: float
    drain_s: float


@dataclass(frozen=True)
class JoinAnswer:
    """A rank with the slots to allocate and the experts to load first, or why there is none."""

    rank: int | None
    reason: str  # empty with a rank
    refused: bool  # there will be no rank, however long the shard waits
    epoch: int
    num_slots: int  # of a layer
    placement: Placement | None  # whose row of that rank is to be loaded; None without a rank
    times: Times
    load_LE: np.ndarray | None = field(default=None, compare=False)  # float [L, E]: tokens of each expert, if known


@dataclass(frozen=True, eq=False)
class ShardHolding:
    """A shard that serves. `held_LE` bool [L, E]: the experts in its slots."""

    shard_id: str
    node_id: str
    serve_rank: int
    endpoint: ShardEndpoint
    num_slots: int
    expert_bytes: int
    held_LE: np.ndarray


@dataclass(frozen=True)
class Told:
    """What people told a controller and its shards keep for the next one."""

    drained: bool = False  # this shard is to hand on what it has
    paused: bool = False  # nothing is to move


@dataclass(frozen=True)
class RejoinRequest:
    """A shard that serves introduces itself to a controller that does not know it."""

    holding: ShardHolding
    epoch: int  # the highest it has heard of
    target: dict[str, Any] | None  # the newest that it has heard of, as `Target.to_json`
    stopping: bool
    told: Told = Told()


@dataclass(frozen=True)
class HeartbeatAnswer:
    """Reply to a sign of life."""

    known: bool  # False: the shard has no seat and must join or rejoin
    epoch: int
    times: Times
    told: Told = Told()
    scaling: ScalingFacts | None = None


@dataclass(frozen=True, eq=False)
class CopyReport:
    """What a shard holds now, and what became of copies since its last report."""

    shard_id: str
    held_LE: np.ndarray  # bool [L, E]
    results: tuple[CopyResult, ...]


@dataclass(frozen=True, eq=False)
class OrderRequest:
    """A shard's long poll for its next order."""

    shard_id: str
    term: str  # the life of the controller that gave the last order; empty before the first
    version: int  # of the last order carried out
    target_version: int  # the newest it has heard of; -1 before the first
    wait_s: float  # answer by then, with or without news
    report: CopyReport | None = None  # what came of the last order


@dataclass(frozen=True)
class ShardOrder:
    """What a shard has to do: free slots, then copy experts into free slots."""

    version: int
    release: tuple[tuple[int, int], ...]  # (layer, expert)
    copy: tuple[CopyOrder, ...]
    max_bytes_per_s: float | None


@dataclass(frozen=True)
class OrderAnswer:
    """The next order, or None. `target` is there if it is newer than the shard's."""

    known: bool  # False: the shard has no seat and must rejoin
    term: str
    order: ShardOrder | None
    target: dict[str, Any] | None


@dataclass(frozen=True)
class MembershipRequest:
    """A router's long poll."""

    router_id: str
    term: str  # the life of the controller that gave out `epoch`; empty before the first
    epoch: int  # that the router is at; -1 before the first
    lost: dict[int, str]  # incarnation of each shard the router has given up, by rank
    wait_s: float  # answer by then, with or without news
    whole: bool = False  # the router does not have the membership of `epoch` at hand, so a difference is no use


@dataclass(frozen=True)
class MembershipNews:
    """A MembershipAnswer as it travels."""

    term: str
    told: bytes | None  # `Membership.delta_from` the one of the request's epoch
    waiting_for: list[int]


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
    serving: bool  # False while it starts
    state: str  # joining, filling, serving or draining
    num_slots: int  # of a layer; 0 while it starts
    experts_held: int  # over all layers
    experts_missing: int  # that the target gives it and it does not have yet
    silent_s: float  # since its last sign of life
    pid: int | None  # None while it starts
    status: ShardStatus | None  # of its last heartbeat; None before the first

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the status' keys stand among the seat's own."""
        seat = asdict(self)
        del seat["status"]
        return {**(self.status.to_dict() if self.status is not None else {}), **seat}


@dataclass(frozen=True)
class MigrationView:
    """How far the published placement is from the target."""

    target_version: int  # 0 while there is none
    origin: str  # why the target is what it is
    phase: str  # idle, retiring or copying
    moving: bool
    paused: bool
    copies_in_flight: int
    copies_left: int  # of the present plan, those in flight among them
    bytes_left: int
    rounds: int  # done since the controller started, as the next three
    copies: int
    copied_bytes: int
    failed_copies: int
    sole_copies: int  # (layer, expert) that one shard alone has
    unserved: int  # (layer, expert) that no shard has
    problem: str  # why the target is not reached or cannot be made, one line; empty if all is well


@dataclass(frozen=True)
class ControllerStatus:
    """Who is where."""

    term: str  # names this life of the controller
    epoch: int
    complete: bool  # every expert is served
    missing_ranks: list[int]  # that the target gives experts and no shard has
    num_ranks: int
    migration: MigrationView
    routers: dict[str, RouterView]  # by router id
    shards: list[SeatView]  # by rank
    refusal: str = ""  # why shards cannot start, for a reason that will not change; empty if they can
    autopilot: AutopilotView = field(default_factory=AutopilotView)

    def to_dict(self) -> dict[str, Any]:
        """Plain data with these fields as keys."""
        return {**asdict(self), "shards": [shard.to_dict() for shard in self.shards]}


@dataclass(frozen=True)
class PlacementView:
    """The placement that routers dispatch by, the one to reach, and what they mean."""

    epoch: int
    placement: Placement
    experts_of_rank: list[list[list[int]]]  # logical experts, ascending, by rank and layer
    target_version: int
    target: Placement | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data with these fields as keys."""
        return {
            **{name: value for name, value in vars(self).items() if name not in ("placement", "target")},
            "placement": self.placement.to_json(),
            "target": None if self.target is None else self.target.to_json(),
        }


@dataclass(frozen=True)
class PlanView:
    """What a placement would take, or took on: the answer to `apply` and to its dry run."""

    accepted: bool
    target_version: int  # 0 for a dry run
    rounds: int
    copies: int
    bytes_by_nearness: dict[str, int]
    expected_s: float
    reason: str  # why it was not accepted; empty if it was

    def to_dict(self) -> dict[str, Any]:
        """Plain data with these fields as keys."""
        return asdict(self)


@dataclass(frozen=True)
class HistoryEntry:
    """A target that was set."""

    version: int
    origin: str
    begun: float  # seconds since 1970
    ended: float | None  # None while it is not reached; also set when another target replaced it
    outcome: str  # reached, replaced or under way
    copies: int
    copied_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data with these fields as keys."""
        return asdict(self)


@dataclass(frozen=True)
class MeshEvent:
    """Something that happened to the mesh, for people."""

    number: int  # counts up in one life of the controller
    at: float  # seconds since 1970
    kind: str  # start, join, serve, lost, left, back, drain, target, unserved, served, router or epoch
    text: str  # one line
    epoch: int  # afterwards
    rank: int | None = None


@dataclass(frozen=True)
class PublishedView:
    """Which experts routers find at which rank."""

    epoch: int
    num_layers: int
    num_experts: int
    bits: dict[int, bytes]  # by rank: bool [L, E], eight to a byte (numpy.packbits)


@dataclass(frozen=True)
class WatchView:
    """All that the live page shows of the controller."""

    status: ControllerStatus
    published: PublishedView | None  # None: the caller has it
    history: list[HistoryEntry]  # the last ones, oldest first, as the next two
    decisions: list[Decision]
    events: list[MeshEvent]
