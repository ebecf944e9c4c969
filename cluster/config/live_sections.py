"""What a running controller takes on, its user_config: `placement`, `migration`, `membership`, `autopilot`, `scaling`.

They are no arguments of the application, since Serve replaces every replica of an application whose arguments change:

    - name: experts
      import_path: serve_app:build_experts
      args: {model: ..., shards: ...}
      deployments:
        - {name: ExpertShard, num_replicas: 3}
        - {name: PlacementController, user_config: {placement: ..., migration: ..., membership: ...}}
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cluster.config.autopilot_section import AutopilotSection
from cluster.config.scaling_section import ScalingSection
from experts.protocol.settings import StrictModel

PlacementPolicy = Literal["linear", "greedy", "optimized"]

# The keys of `placement` that have an effect on what a policy or a file gives; all of them have with `optimized`.
ALWAYS_READ = {"min_replicas", "spare_slots", "protect", "trace"}
READ_BY = {
    "linear": {"policy", "num_nodes", *ALWAYS_READ},
    "greedy": {"policy", "num_nodes", "seed", *ALWAYS_READ},
    "file": {"file", *ALWAYS_READ},
}


class PlacementSection(StrictModel):
    """Which expert each slot holds."""

    policy: PlacementPolicy = Field(
        default="linear",
        description="linear: experts in order; greedy: even loads; optimized: few shards per token as well. greedy "
        "and optimized plan for a trace.",
    )
    file: str | None = Field(
        default=None, description="Placement saved as JSON, for as many ranks as there are shards. No policy runs."
    )
    trace: str | None = Field(
        default=None,
        description="Routing trace (.npz) that a policy plans for. It also says which experts are hot: what protect "
        "means, what moves first, and what is in memory first on shards that offload.",
    )
    num_nodes: int | None = Field(
        default=None,
        ge=1,
        description="Number of nodes to plan for. Defaults to those that the shards are on, if each has equally many, "
        "else 1: nodes are left out.",
    )
    min_replicas: int = Field(default=1, ge=1, description="Fewest replicas of an expert, each on a different shard.")
    protect: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of each layer's traffic whose experts get two replicas, the most used first: 0.5 protects "
        "half of the traffic from the loss of a shard.",
    )
    spare_slots: int = Field(
        default=1,
        ge=0,
        description="Slots of each layer and shard that stay empty, so that experts can move. Without any, a full mesh "
        "cannot change its placement.",
    )
    load_cap: float = Field(
        default=1.05,
        ge=1,
        description="Highest load of a shard relative to an even share. A higher cap allows fewer shards per token.",
    )
    max_seconds: float = Field(
        default=30.0,
        gt=0,
        description="Limit on the optimizer's search. The search is sized to take about a third of it.",
    )
    prefer_local_replicas: bool = Field(
        default=False,
        description="Plan for a router on every node that prefers replicas on its own node. Set "
        "transport.prefer_local_replicas as well.",
    )
    seed: int = Field(default=0, description="Random seed of the policy.")

    @model_validator(mode="after")
    def _one_source(self) -> PlacementSection:
        source, read = ("file is given", "file") if self.file is not None else (f"policy is {self.policy}", self.policy)
        given = {name for name in self.model_fields_set if getattr(self, name) is not None}
        if idle := sorted(given - READ_BY.get(read, given)):
            raise ValueError(f"{source}, so {', '.join(idle)} would have no effect: remove")
        if self.file is None and self.policy != "linear" and self.trace is None:
            raise ValueError(
                f"policy is {self.policy!r}, which plans for a trace, and trace is not set; a running service returns "
                "one at GET /expertmesh/trace"
            )
        return self


class MigrationSection(StrictModel):
    """How experts move."""

    max_bytes_per_s: float | None = Field(
        default=1e9,
        gt=0,
        description="Most bytes of weights that a shard takes in per second. null: as fast as it can. On a full "
        "machine copies give way to requests and are slower.",
    )
    round_s: float = Field(
        default=1.0,
        gt=0,
        description="Seconds of copying after which routers get an epoch with what came. Shorter rounds bring experts "
        "into use sooner and cost more epochs.",
    )


class MembershipSection(StrictModel):
    """How the placement controller tracks its shards."""

    heartbeat_s: float = Field(default=1.0, gt=0, description="Period of a shard's heartbeat.")
    lost_after_s: float = Field(
        default=10.0, gt=0, description="A shard without a heartbeat for this long leaves the membership."
    )
    replace_after_s: float = Field(
        default=120.0,
        ge=0,
        description="How long the experts of a lost shard wait for its replacement. After that the other shards take "
        "them.",
    )
    retry_lost_after_s: float = Field(
        default=5.0,
        gt=0,
        description="Pause before routers retry a shard that one of them gave up and that still sends heartbeats.",
    )
    drain_s: float = Field(
        default=3.0,
        ge=0,
        description="Longest time that a shard without experts of its own keeps answering routers that still use it.",
    )

    @model_validator(mode="after")
    def _two_beats(self) -> MembershipSection:
        if self.lost_after_s < 2 * self.heartbeat_s:
            raise ValueError(
                f"lost_after_s is {self.lost_after_s}, expected at least twice heartbeat_s ({self.heartbeat_s})"
            )
        return self


class LiveConfig(StrictModel):
    """What a running mesh takes on: `user_config` of the deployment `PlacementController`."""

    placement: PlacementSection = Field(default=PlacementSection(), description="Which expert each slot holds.")
    migration: MigrationSection = Field(default=MigrationSection(), description="How experts move.")
    membership: MembershipSection = Field(default=MembershipSection(), description="How shards are tracked.")
    autopilot: AutopilotSection = Field(
        default=AutopilotSection(), description="When the placement follows the traffic."
    )
    scaling: ScalingSection = Field(default=ScalingSection(), description="How many shards and routers there are.")
