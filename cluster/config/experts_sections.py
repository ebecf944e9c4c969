"""Sections of the application `experts`: shards, placement, membership."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from experts.protocol.settings import ShardSettings, StrictModel

PlacementPolicy = Literal["linear", "greedy", "optimized"]


# Which keys of the placement section have an effect, where not all do: by policy, or for a file.
READ_BY = {
    "linear": {"policy", "num_nodes", "min_replicas"},
    "greedy": {"policy", "num_nodes", "min_replicas", "trace", "seed"},
    "file": {"file", "num_nodes", "min_replicas"},
}


def _shard_default(name: str) -> Any:
    return ShardSettings.model_fields[name].default


class ShardsSection(StrictModel):
    """The expert shards: one replica of the deployment `ExpertShard` each."""

    count: int = Field(ge=1, description="Shards, which are the ranks of the placement.")
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="Where experts are held and computed.")
    kernel: str = Field(
        default=_shard_default("kernel"), description="Name of a kernel, or auto: the fastest by measurement at start."
    )
    num_threads: int = Field(default=_shard_default("num_threads"), ge=1, description="CPU threads of the kernel.")
    slots_per_rank: int | None = Field(
        default=None,
        ge=1,
        description="Slots of a shard in each layer; as few as hold every expert if not given. More make room for "
        "replicas of experts.",
    )
    max_rows_per_dispatch: int = Field(
        default=_shard_default("max_rows_per_dispatch"), ge=1, description="Largest message accepted, in rows."
    )
    spin_us: float = Field(
        default=_shard_default("spin_us"), ge=0, description="How long the idle loop yields its core before it sleeps."
    )
    connect_s: float = Field(
        default=_shard_default("connect_timeout_s"),
        gt=0,
        description="Connecting one router to a shard; as long as the routers' deadlines.connect_s is a good choice.",
    )
    ray_actor_options: dict[str, Any] = Field(
        default_factory=dict,
        description="Ray's options of a shard's actor: num_cpus, num_gpus, resources, runtime_env.",
    )
    deployment_config: dict[str, Any] = Field(
        default_factory=dict, description="Ray Serve's options of the deployment, such as health_check_period_s."
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
            raise ValueError("device is cuda, so ray_actor_options.num_gpus has to be more than 0")
        return self


class PlacementSection(StrictModel):
    """Which expert each slot holds."""

    policy: PlacementPolicy = Field(
        default="linear",
        description="linear: experts in order; greedy: even loads; optimized: even loads and few shards a token. "
        "The last two plan for a trace.",
    )
    file: str | None = Field(default=None, description="A placement saved as JSON, used instead of a policy.")
    trace: str | None = Field(default=None, description="Routing trace (.npz) to plan for.")
    num_nodes: int = Field(
        default=1, ge=1, description="Nodes of the shards, which are dealt to them in equal blocks; a file has its own."
    )
    min_replicas: int = Field(
        default=1, ge=1, description="Least number of replicas of every expert, on different shards."
    )
    load_cap: float = Field(
        default=1.05, ge=1, description="Largest load of a shard over the mean; more allows fewer shards a token."
    )
    max_seconds: float = Field(
        default=30.0,
        gt=0,
        description="Bound on the optimizer's time; its search is sized to take about a third of it.",
    )
    prefer_local_replicas: bool = Field(
        default=False,
        description="Plan for a router on every node that takes replicas on its node first; set "
        "transport.prefer_local_replicas too.",
    )
    seed: int = Field(default=0, description="Seed of the policy; the same seed gives the same placement.")

    @model_validator(mode="after")
    def _one_source(self) -> PlacementSection:
        source, read = ("file is given", "file") if self.file is not None else (f"policy is {self.policy}", self.policy)
        given = {name for name in self.model_fields_set if getattr(self, name) is not None}
        if idle := sorted(given - READ_BY.get(read, given)):
            raise ValueError(f"{source}, so {', '.join(idle)} would have no effect; leave out")
        if self.file is None and self.policy != "linear" and self.trace is None:
            raise ValueError(
                f"policy is {self.policy!r}, which plans for a trace; give one (GET /expertmesh/trace of a running "
                "service returns one)"
            )
        return self


class MembershipSection(StrictModel):
    """How the placement controller follows its shards."""

    heartbeat_s: float = Field(default=1.0, gt=0, description="Period of a shard's sign of life.")
    lost_after_s: float = Field(
        default=10.0, gt=0, description="A shard that gave no sign of life for so long leaves the membership."
    )
    join_timeout_s: float = Field(
        default=600.0, gt=0, description="A shard that found no rank by then fails its start, and Serve restarts it."
    )
    retry_lost_after_s: float = Field(
        default=5.0,
        gt=0,
        description="When a router gave up a shard that still gives signs of life: pause before routers try it again.",
    )
    drain_s: float = Field(
        default=3.0, ge=0, description="A leaving shard answers for so long, until every router goes on without it."
    )
    ray_actor_options: dict[str, Any] = Field(
        default_factory=lambda: {"num_cpus": 0}, description="Ray's options of the controller's actor."
    )

    @model_validator(mode="after")
    def _two_beats(self) -> MembershipSection:
        if self.lost_after_s < 2 * self.heartbeat_s:
            raise ValueError(
                f"lost_after_s is {self.lost_after_s}, expected at least twice heartbeat_s ({self.heartbeat_s})"
            )
        return self
