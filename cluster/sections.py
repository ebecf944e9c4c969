"""The sections of a config: what a user may say of the model, the shards, the placement, the routers and HTTP.

Two Serve applications read them: `experts` (model, shards, placement, membership) and `llm` (model, routers, transport,
deadlines, http). A key stands in one section only, so that editing one application's section never restarts the other.
Unknown keys are errors; units are in the names; a default that the data plane has too is read from there.
"""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from experts.settings import DTypeName, RouterSettings, ShardSettings, StrictModel, TransportName

PlacementPolicy = Literal["linear", "greedy", "optimized"]
# The keys of the placement's section that have an effect, where not all have: by policy, or for a file.
READ_BY = {
    "linear": {"policy", "num_nodes", "min_replicas"},
    "greedy": {"policy", "num_nodes", "min_replicas", "trace", "seed"},
    "file": {"file", "num_nodes", "min_replicas"},
}


def _router_default(name: str) -> Any:
    return RouterSettings.model_fields[name].default


def _shard_default(name: str) -> Any:
    return ShardSettings.model_fields[name].default


class ModelSection(StrictModel):
    """Which model; both applications read it, so write it once and refer to it (`&model`, `*model`)."""

    id: str = Field(min_length=1, description="Name of the model in the OpenAI API; without a colon.")
    path: str = Field(
        min_length=1,
        description="Folder of the Hugging Face checkpoint, the same on every node. A relative path is sought beside "
        "the config file, in the current folder and in the folder of serve_app.py.",
    )
    dtype: DTypeName = Field(
        default="bfloat16", description="What weights are held and computed in, on routers and shards alike."
    )

    @field_validator("id")
    @classmethod
    def _no_adapter(cls, value: str) -> str:
        if ":" in value:
            raise ValueError(
                f"{value!r} has a colon, behind which Ray Serve LLM reads the name of an adapter: no request for the "
                f"model would find it; take {value.replace(':', '-')!r}, say"
            )
        return value


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
        default=_shard_default("connect_deadline_s"),
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
    """Which expert stands in which slot."""

    policy: PlacementPolicy = Field(
        default="linear",
        description="linear: in order; greedy: even loads; optimized: few shards a token as well. Those two plan "
        "for a trace.",
    )
    file: str | None = Field(default=None, description="A placement saved as JSON, used as it is; no policy is run.")
    trace: str | None = Field(default=None, description="Routing trace (.npz) that the policy plans for.")
    num_nodes: int = Field(
        default=1, ge=1, description="Nodes that the shards stand on in equal blocks; with a file, the file's."
    )
    min_replicas: int = Field(default=1, ge=1, description="Replicas of every expert at least, on different shards.")
    load_cap: float = Field(
        default=1.05, ge=1, description="How much more than its even share a shard may get, for fewer shards a token."
    )
    max_seconds: float = Field(
        default=30.0,
        gt=0,
        description="Sizes the optimizer's search, to about a third of it, and stops a search that takes longer.",
    )
    near_replicas_first: bool = Field(
        default=False,
        description="Plan for a router on every node that takes replicas there first: set "
        "transport.near_replicas_first as well.",
    )
    seed: int = Field(default=0, description="Seed of the policy's choices.")

    @model_validator(mode="after")
    def _one_source(self) -> PlacementSection:
        source, read = ("file is given", "file") if self.file is not None else (f"policy is {self.policy}", self.policy)
        given = {name for name in self.model_fields_set if getattr(self, name) is not None}
        if idle := sorted(given - READ_BY.get(read, given)):
            raise ValueError(f"{source}, so {', '.join(idle)} would have no effect; leave out")
        if self.file is None and self.policy != "linear" and self.trace is None:
            raise ValueError(
                f"policy is {self.policy!r}, which plans for a trace; give one (GET /expertmesh/trace of a running "
                "service answers with one)"
            )
        return self


class MembershipSection(StrictModel):
    """How the placement controller follows its shards."""

    heartbeat_s: float = Field(default=1.0, gt=0, description="Period of a shard's sign of life.")
    lost_after_s: float = Field(
        default=10.0, gt=0, description="A shard that gave no sign of life for so long leaves the membership."
    )
    join_deadline_s: float = Field(
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


class RoutersSection(StrictModel):
    """The routers: replicas of Ray Serve LLM, each with a vLLM engine that holds no expert weights."""

    count: int | None = Field(
        default=None, ge=1, description="Routers; 1 if neither this nor deployment_config says how many."
    )
    accelerator: Literal["cpu", "gpu"] = Field(default="cpu", description="What the engines run on.")
    accelerator_type: str | None = Field(default=None, description="Ray's name of the GPU, such as H100.")
    engine_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Any of vLLM's engine options, as Ray Serve LLM takes them."
    )
    deployment_config: dict[str, Any] = Field(
        default_factory=dict, description="Any of Ray Serve's options of the deployment, autoscaling_config included."
    )
    placement_group_config: dict[str, Any] | None = Field(
        default=None, description="Ray Serve LLM's bundles of an engine's workers: bundle_per_worker or bundles."
    )
    llm_config: dict[str, Any] = Field(
        default_factory=dict,
        description="Further fields of Ray Serve LLM's LLMConfig: experimental_configs, callback_config.",
    )
    env_vars: dict[str, str] = Field(default_factory=dict, description="Environment of the routers and their engines.")
    trace_tokens: int = Field(
        default=_router_default("trace_tokens"),
        ge=0,
        description="Tokens of which a router keeps its routing decisions, as a uniform sample, for planning; 0: none.",
    )
    fallback_cache_bytes: int = Field(
        default=_router_default("fallback_cache_bytes"),
        ge=0,
        description="A router computes experts that no live shard holds; this many bytes of them stay converted.",
    )

    @field_validator("engine_kwargs")
    @classmethod
    def _owned_engine_options(cls, value: dict[str, Any]) -> dict[str, Any]:
        owned = {
            "worker_extension_cls": "it names the plug-in that replaces the routed experts",
            "load_format": "the loader leaves the experts' tensors out",
            "model": "use model.path instead",
            "served_model_name": "use model.id instead",
            "dtype": "use model.dtype instead, which the shards follow too",
        }
        for key, why in owned.items():
            if key in value:
                raise ValueError(f"{key} is set by the project: {why}")
        extra = value.get("additional_config")
        if isinstance(extra, dict) and "expertmesh" in extra:
            raise ValueError("additional_config.expertmesh is set by the project: use transport and deadlines instead")
        for key in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            if value.get(key, 1) != 1:
                raise ValueError(f"{key} is {value[key]!r}, expected 1: run more routers instead, see routers.count")
        if value.get("enable_expert_parallel"):
            raise ValueError("enable_expert_parallel has no meaning here: the experts stand on the shards")
        return value

    @field_validator("llm_config")
    @classmethod
    def _owned_llm_options(cls, value: dict[str, Any]) -> dict[str, Any]:
        own_place = (
            "model_loading_config engine_kwargs deployment_config placement_group_config accelerator_type server_cls "
            "accelerator_config runtime_env"
        )
        for key in own_place.split():
            if key in value:
                raise ValueError(f"{key} has a place of its own in this config, or is set by the project")
        if value.get("lora_config") is not None:
            raise ValueError("lora_config is given, and LoRA adapters are not served: the engine would refuse them")
        return value

    @model_validator(mode="after")
    def _one_count(self) -> RoutersSection:
        given = [key for key in ("num_replicas", "autoscaling_config") if key in self.deployment_config]
        if self.count is not None and given:
            raise ValueError(f"count and deployment_config.{given[0]} are both given; give one")
        return self


class TransportSection(StrictModel):
    """How rows travel between routers and shards."""

    name: TransportName = Field(
        default=_router_default("transport"),
        description="auto: NCCL between GPUs, shared memory within a host, gloo across hosts.",
    )
    max_rows_per_dispatch: int = Field(
        default=_router_default("max_rows_per_dispatch"),
        ge=1,
        description="Rows of one message at most; a larger step goes out in several rounds.",
    )
    spin_us: float = Field(
        default=_router_default("spin_us"), ge=0, description="How long a wait yields the core before it sleeps."
    )
    near_replicas_first: bool = Field(
        default=_router_default("near_replicas_first"),
        description="Fetch experts from replicas on the router's own host where there are any, whatever their load: "
        "for hosts that each have a router and their share of the requests.",
    )


class DeadlinesSection(StrictModel):
    """Bounds on everything that a router waits for."""

    dispatch_ms: float = Field(
        default=_router_default("dispatch_deadline_ms"),
        gt=0,
        description="A shard that has not answered a dispatch by then is given up for this epoch.",
    )
    connect_s: float = Field(
        default=_router_default("connect_deadline_s"), gt=0, description="Connecting a router to one shard."
    )
    membership_s: float = Field(
        default=600.0, gt=0, description="A starting router's wait for the shards: on a cold start for all of them."
    )
    apply_s: float = Field(default=120.0, gt=0, description="Handing one epoch to an engine's workers.")
    probe_s: float = Field(default=10.0, gt=0, description="The one token that /health generates on demand.")


class HttpSection(StrictModel):
    """The HTTP side, besides Serve's own http_options."""

    api_keys: list[str] = Field(
        default_factory=list, description="Keys that clients may use; none: everyone may. Prefer api_keys_env."
    )
    api_keys_env: str | None = Field(
        default=None, description="Environment variable with more keys, separated by commas; has to be set if named."
    )
    max_pending_requests: int = Field(
        default=256,
        ge=1,
        description="Generation requests that one ingress holds, running or queued; a further one gets 503.",
    )
    retry_after_s: int = Field(default=1, ge=0, description="What the Retry-After header of such a 503 says.")
    healthy_within_s: float = Field(
        default=10.0,
        ge=0,
        description="/health counts tokens generated through the shards so recently; else it generates one.",
    )
    deployment_config: dict[str, Any] = Field(
        default_factory=dict, description="Ray Serve's options of the ingress deployment, ray_actor_options included."
    )

    @field_validator("api_keys")
    @classmethod
    def _not_empty(cls, value: list[str]) -> list[str]:
        if any(not key.strip() for key in value):
            raise ValueError("an API key is empty")
        return value

    def keys(self) -> frozenset[str]:
        """Every key that is accepted; empty means that everyone may. Raises ValueError if api_keys_env is not set."""
        keys = set(self.api_keys)
        if self.api_keys_env is not None:
            named = [key.strip() for key in os.environ.get(self.api_keys_env, "").split(",") if key.strip()]
            if not named:
                raise ValueError(
                    f"http.api_keys_env names {self.api_keys_env}, which holds no key where the application is built"
                )
            keys.update(named)
        return frozenset(keys)
