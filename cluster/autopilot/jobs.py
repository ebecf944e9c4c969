"""What the controller asks its background process, and what comes back. Both ends pickle these; nothing heavy here."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.autopilot.estimates import Estimate, Prices
from placement.capacity.residency import Offload
from placement.placement import Placement
from placement.traces.observation import Observation


@dataclass(frozen=True)
class Model:
    """What the price of a step follows from."""

    expert_bytes: int
    weight_bytes: float  # of one parameter
    shard_bytes: int  # all experts of one shard
    device: str  # cpu or cuda
    # Shards have some experts in memory only, and copy the others when they are asked for.
    offload: Offload | None = None


@dataclass(frozen=True, eq=False)
class JudgeJob:
    """Price placements on what was seen, and the first of them on traffic that was planned for, if there is some."""

    model: Model
    placements: tuple[Placement, ...]
    seen: Observation
    reference: Observation | None = None


@dataclass(frozen=True, eq=False)
class Verdict:
    """`prices` of each placement on the same steps; `planned` of the first one, on steps of the same sizes.

    `reuse`: how often each token of the reference is in those.
    """

    prices: tuple[Prices, ...]
    planned: Prices | None
    reuse: float = 1.0


@dataclass(frozen=True, eq=False)
class PlanJob:
    """Find a placement near the present one that is worth its copies.

    `slots_per_rank`: usable ones, without spare slots. `copy_s`: seconds of serving that a copy costs; `steps`: that
    its gain lasts for. `max_copies` None: as many as are worth it. `fresh_s`: time for a plan from nothing.
    """

    model: Model
    current: Placement
    seen: Observation
    slots_per_rank: int
    min_replicas: int
    load_cap: float
    copy_s: float
    steps: float
    max_copies: int | None
    fresh_s: float


@dataclass(frozen=True, eq=False)
class Proposal:
    """A placement, and what it saves on steps that it was not made for."""

    placement: Placement
    copies: int
    gain: Estimate
    step_s: float  # with the present placement, on those steps


@dataclass(frozen=True)
class PrepareJob:
    """Load the planner's machine code, or compile it, which takes a minute: no other job's time goes into that."""


@dataclass(frozen=True)
class Prepared:
    """Other jobs begin at once."""


Job = PrepareJob | JudgeJob | PlanJob
Result = Prepared | Verdict | Proposal


@dataclass(frozen=True)
class Failure:
    """The job raised; one line for a person."""

    reason: str
