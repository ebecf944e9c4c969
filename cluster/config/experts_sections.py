"""The sections `shards`, `placement` and `membership` of the application `experts`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from experts.protocol.settings import ShardSettings, StrictModel

PlacementPolicy = Literal["linear", "greedy", "optimized"]

# The keys of `placement` that have an effect: with a file, and by policy. All of them have with `optimized`.
READ_BY = {
    "linear": {"policy", "num_nodes", "min_replicas"},
    "greedy": {"policy", "num_nodes", "min_replicas", "trace", "seed"},
    "file": {"file", "num_nodes", "min_replicas"},
}


def _shard_default(name: str) -> Any:
    return ShardSettings.model_fields[name].default


class ShardsSection(StrictModel):
    """The expert shards. Each is one replica of the deployment `ExpertShard`."""

    count: int = Field(ge=1, description="Number of shards, which is the number of ranks of the placement.")
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="Device that holds and computes the experts.")
    kernel: str = Field(
        default=_shard_default("kernel"), description="Name of a kernel, or auto: the fastest one measured at start."
    )
    num_threads: int = Field(default=_shard_default("num_threads"), ge=1, description="CPU threads of the kernel.")
    slots_per_rank: int | None = Field(
        default=None,
        ge=1,
        description="Expert slots of a shard in each layer. Defaults to the smallest number that holds every expert; "
        "more slots make room for replicas.",
    )
    max_rows_per_dispatch: int = Field(
        default=_shard_default("max_rows_per_dispatch"), ge=1, description="Largest message a shard accepts, in rows."
    )
    spin_us: float = Field(
        default=_shard_default("spin_us"),
        ge=0,
        description="Microseconds the idle loop yields its core before it sleeps.",
    )
    connect_s: float = Field(
        default=_shard_default("connect_timeout_s"),
        gt=0,
        description="Time-out for connecting one router to a shard. Use the same value as the routers' "
        "deadlines.connect_s.",
    )
    ray_actor_options: dict[str, Any] = Field(
        default_factory=dict,
        description="Ray options of a shard's actor: num_cpus, num_gpus, resources, runtime_env.",
    )
    deployment_config: dict[str, Any] = Field(
        default_factory=dict, description="Ray Serve options of the deployment, such as health_check_period_s."
    )

    @field_validator("deployment_config")
    @classmethod
    def _owned_options(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key, instead in (
            ("num_replicas", "count"),
            ("autoscaling_config", "count"),
            ("ray_actor_options", "ray_actor_options"),
        ):
            if key in value:
                raise ValueError(f"{key} is set by the project; use shards.{instead} instead")
        return value

    @model_validator(mode="after")
    def _gpu_on_cuda(self) -> ShardsSection:
        if self.device == "cuda" and not self.ray_actor_options.get("num_gpus"):
            raise ValueError("device is cuda, so ray_actor_options.num_gpus must be more than 0")
        return self


class PlacementSection(StrictModel):
    """Which expert each slot holds."""

    policy: PlacementPolicy = Field(
        default="linear",
        description="linear: experts in order; greedy: even loads; optimized: few shards per token as well. greedy "
        "and optimized plan for a trace.",
    )
    file: str | None = Field(default=None, description="Placement saved as JSON. It is used as it is; no policy runs.")
    trace: str | None = Field(default=None, description="Routing trace (.npz) the policy plans for.")
    num_nodes: int = Field(
        default=1,
        ge=1,
        description="Number of nodes, each with an equal block of the shards. A placement file brings its own.",
    )
    min_replicas: int = Field(default=1, ge=1, description="Fewest replicas of an expert, each on a different shard.")
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


class MembershipSection(StrictModel):
    """How the placement controller tracks its shards."""

    heartbeat_s: float = Field(default=1.0, gt=0, description="Period of a shard's heartbeat.")
    lost_after_s: float = Field(
        default=10.0, gt=0, description="A shard without a heartbeat for this long leaves the membership."
    )
    join_timeout_s: float = Field(
        default=600.0, gt=0, description="A shard without a rank after this long fails to start, and Serve restarts it."
    )
    retry_lost_after_s: float = Field(
        default=5.0,
        gt=0,
        description="Pause before routers retry a shard that one of them gave up and that still sends heartbeats.",
    )
    drain_s: float = Field(
        default=3.0, ge=0, description="Longest time a leaving shard keeps answering while routers still use it."
    )
    ray_actor_options: dict[str, Any] = Field(
        default_factory=lambda: {"num_cpus": 0}, description="Ray options of the controller's actor."
    )

    @model_validator(mode="after")
    def _two_beats(self) -> MembershipSection:
        if self.lost_after_s < 2 * self.heartbeat_s:
            raise ValueError(
                f"lost_after_s is {self.lost_after_s}, expected at least twice heartbeat_s ({self.heartbeat_s})"
            )
        return self
