"""The sections `shards`, `controller` and `mesh`: arguments of the application `experts`, which restart it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from experts.protocol.settings import NOT_OFFLOADED, OffloadSettings, ShardSettings, StrictModel, TlsFiles

NUMBER_OF_SHARDS = "deployments: [{name: ExpertShard, num_replicas: N}] beside args"


def _shard_default(name: str) -> Any:
    return ShardSettings.model_fields[name].default


class ShardsSection(StrictModel):
    """The expert shards. Each is one replica of the deployment `ExpertShard`."""

    device: Literal["cpu", "cuda"] = Field(default="cpu", description="Device that holds and computes the experts.")
    kernel: str = Field(
        default=_shard_default("kernel"), description="Name of a kernel, or auto: the fastest one measured at start."
    )
    num_threads: int = Field(default=_shard_default("num_threads"), ge=1, description="CPU threads of the kernel.")
    slots_per_rank: int | None = Field(
        default=None,
        ge=1,
        description="Expert slots of a shard in each layer, placement.spare_slots among them. Defaults to as many as "
        "the first placement needs and spare_slots more; more slots make room for replicas and for fewer shards.",
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
    max_handshakes: int = Field(
        default=_shard_default("max_handshakes"),
        ge=1,
        description="Connections to a shard that are not answered yet; newer ones push out strangers.",
    )
    max_pairs: int = Field(
        default=_shard_default("max_pairs"),
        ge=1,
        description="Most pairs of a shard with routers at a time; each process of a router has one.",
    )
    max_pairs_per_router: int = Field(
        default=_shard_default("max_pairs_per_router"), ge=1, description="Likewise, for one process of a router."
    )
    offload: OffloadSettings | None = Field(
        default=None, description="More experts than the kernel's memory takes. By default all are in it."
    )
    join_timeout_s: float = Field(
        default=600.0, gt=0, description="A shard without a rank after this long fails to start, and Serve restarts it."
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
            ("num_replicas", NUMBER_OF_SHARDS),
            ("autoscaling_config", "deployments: [{name: ExpertShard, autoscaling_config: {...}}] beside args"),
            ("ray_actor_options", "shards.ray_actor_options"),
        ):
            if key in value:
                raise ValueError(f"{key} does not belong here; write {instead}")
        return value

    @model_validator(mode="after")
    def _gpu_on_cuda(self) -> ShardsSection:
        if self.device == "cuda" and not self.ray_actor_options.get("num_gpus"):
            raise ValueError("device is cuda, so ray_actor_options.num_gpus must be more than 0")
        if self.device == "cuda" and self.offload is not None and self.offload.folder is not None:
            raise ValueError("offload.folder is set, but shards on GPUs keep experts in host memory: remove it")
        return self

    @model_validator(mode="after")
    def _kernel_can_be_offloaded(self) -> ShardsSection:
        if self.offload is not None and self.offload.resident_fraction < 1 and self.kernel in NOT_OFFLOADED:
            raise ValueError(
                f"kernel is {self.kernel!r}, which cannot be offloaded, since its slots cannot be copied as bytes: "
                "expected auto, which then takes another one, or no section offload"
            )
        return self


class ControllerSection(StrictModel):
    """The placement controller's process."""

    ray_actor_options: dict[str, Any] = Field(
        default_factory=lambda: {"num_cpus": 0}, description="Ray options of the controller's actor."
    )


class MeshSection(StrictModel):
    """Who may take part in the mesh."""

    secret_env: str | None = Field(
        default=None,
        min_length=1,
        description="Environment variable of the controller's process with the mesh's secret, at least 32 characters. "
        "By default the controller makes a secret up, which lives as long as one shard or router that knows it.",
    )
    tls: TlsFiles | None = Field(
        default=None,
        description="TLS for every connection to a shard, also of shards that copy experts; transport.tls is the "
        "routers' side.",
    )
