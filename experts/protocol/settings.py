"""Settings of the two ends of the data plane. Strict: an unknown key is an error that names it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

TransportName = Literal["auto", "shm", "gloo", "nccl"]
DTypeName = Literal["float32", "bfloat16", "float16"]


class StrictModel(BaseModel):
    """Base of every settings class of the project."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class RouterSettings(StrictModel):
    """What a router's vLLM worker needs to know; travels in vLLM's `additional_config["expertmesh"]`."""

    model_path: str = Field(description="Folder of the Hugging Face checkpoint; lost experts are computed from it.")
    router_id: str = Field(default="", description="Name of this router in logs and at the shards; made up if empty.")
    transport: TransportName = Field(
        default="auto",
        description="auto: NCCL between GPUs, shared memory within a host, gloo across hosts.",
    )
    dispatch_timeout_ms: float = Field(
        default=5000.0, gt=0, description="A shard that has not answered a dispatch by then is given up for this epoch."
    )
    connect_timeout_s: float = Field(default=30.0, gt=0, description="Bound on connecting to one shard.")
    max_rows_per_dispatch: int = Field(
        default=2048, ge=1, description="Rows of one message at most; a larger step goes out in several rounds."
    )
    fallback_cache_bytes: int = Field(
        default=1 << 30,
        ge=0,
        description="Experts without a live shard are computed on the router; this many bytes of them are kept.",
    )
    spin_us: float = Field(
        default=50.0, ge=0, description="How long a wait in shared memory yields the core before it sleeps."
    )
    prefer_local_replicas: bool = Field(
        default=False,
        description="Fetch an expert from a replica on this router's own host where there is one, whatever its load: "
        "fewer bytes between hosts, and even load only if every host has its share of the requests.",
    )
    trace_tokens: int = Field(default=20_000, ge=0, description="Size of the reservoir of sampled top-k sets; 0: none.")
    membership: dict[str, Any] | None = Field(
        default=None, description="A membership known beforehand, for engines that run without the controller."
    )
    membership_by_rpc: bool = Field(
        default=False,
        description="Whoever starts the engine hands it a membership by collective_rpc before its first request.",
    )


class ShardSettings(StrictModel):
    """What one expert shard needs to know."""

    model_path: str = Field(description="Folder of the Hugging Face checkpoint that holds the experts.")
    dtype: DTypeName = Field(description="What weights are held and computed in; the routers must use the same.")
    device: str = Field(default="cpu", description="Torch device of the experts: cpu, cuda, cuda:1.")
    kernel: str = Field(default="auto", description="Name of a kernel, or auto: the fastest by measurement at start.")
    num_threads: int = Field(default=1, ge=1, description="CPU threads of the kernel.")
    bind_host: str = Field(default="127.0.0.1", description="Address that routers reach this shard at.")
    max_rows_per_dispatch: int = Field(default=2048, ge=1, description="Largest message accepted, in rows.")
    slots_per_rank: int | None = Field(
        default=None, ge=1, description="Slots to allocate in each layer; as many as the placement has if not given."
    )
    spin_us: float = Field(default=50.0, ge=0, description="How long the idle loop yields its core before it sleeps.")
    connect_timeout_s: float = Field(default=30.0, gt=0, description="Bound on one router's handshake.")
