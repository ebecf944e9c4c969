"""Settings of the two ends of the data plane. An unknown key is an error that names the key."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator


def _refuse_gloo(name: object) -> object:
    if name == "gloo":
        raise ValueError('"gloo" is gone, pairs between hosts use TCP; write "tcp", or "auto" to have it chosen')
    return name


TransportName = Annotated[Literal["auto", "shm", "tcp", "cuda_ipc", "nccl"], BeforeValidator(_refuse_gloo)]
DTypeName = Literal["float32", "bfloat16", "float16"]


class StrictModel(BaseModel):
    """Base of every settings class of the project."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class TlsFiles(StrictModel):
    """Mutual TLS 1.3 for the connections between routers and shards. Each file is PEM, on every node, read at start."""

    cert_file: str = Field(description="Certificate of this process, with the chain up to the authority.")
    key_file: str = Field(description="Its key, without a password.")
    ca_file: str = Field(
        description="The authority whose certificates routers and shards accept; names in them do not matter."
    )

    @field_validator("cert_file", "key_file", "ca_file")
    @classmethod
    def _absolute(cls, value: str) -> str:
        if not os.path.isabs(value):
            raise ValueError(f"{value!r} is no absolute path, and every node reads its own file")
        return value


class StepTracing(StrictModel):
    """Which steps and layers of a router become spans, for requests whose trace is sampled."""

    step_interval: int = Field(
        default=16,
        ge=1,
        description="Steps from one that is traced to the next, of those with a request whose trace is sampled. The "
        "first one after others is always traced.",
    )
    layers_per_step: int = Field(
        default=4,
        ge=0,
        description="MoE layers of a traced step that become spans, with one for each shard; others in the next step.",
    )


class RouterSettings(StrictModel):
    """Settings of a router's vLLM worker. They travel in vLLM's `additional_config["expertmesh"]`."""

    model_path: str = Field(
        description="Folder of the Hugging Face checkpoint. Experts without a live shard are computed from it."
    )
    mtp: bool = Field(default=False, description="Whether shards hold the experts of the checkpoint's MTP layer too.")
    router_id: str = Field(default="", description="Name of this router in logs and at the shards; generated if empty.")
    transport: TransportName = Field(
        default="auto",
        description="auto: between GPUs CUDA IPC within a host where they map each other's memory, else NCCL; else "
        "shared memory within a host, TCP across hosts.",
    )
    dispatch_timeout_ms: float = Field(
        default=5000.0,
        gt=0,
        description="A shard that takes longer to answer a dispatch is dropped until the next epoch.",
    )
    connect_timeout_s: float = Field(default=30.0, gt=0, description="Limit on connecting to one shard.")
    max_rows_per_dispatch: int = Field(
        default=2048, ge=1, description="Most rows in one message; a larger step is sent in several rounds."
    )
    fallback_cache_bytes: int = Field(
        default=1 << 30,
        ge=0,
        description="Bytes of weights that the router caches for computing experts without a live shard.",
    )
    fallback_max_ms_per_step: float = Field(
        default=1000.0,
        ge=0,
        description="Time that computing those experts may take in one step of the engine. What does not fit ends the "
        "requests that need it, with an error that tells clients to try again; 0 computes nothing here.",
    )
    spin_us: float = Field(
        default=50.0, ge=0, description="How long a wait for a shard yields the core before it sleeps."
    )
    prefer_local_replicas: bool = Field(
        default=False,
        description="Use a replica on this router's own host where there is one, whatever its load. Fewer bytes cross "
        "between hosts, but load is even only if every host gets an equal share of the requests.",
    )
    trace_tokens: int = Field(
        default=20_000, ge=0, description="Size of the reservoir of sampled top-k sets; 0 turns sampling off."
    )
    reserve_for_shards: int = Field(
        default=16,
        ge=0,
        description="Shards whose pairs get memory of the router's GPU before vLLM sizes its KV cache.",
    )
    tls: TlsFiles | None = Field(default=None, description="TLS; the shards have to have it too. By default none.")
    trace_half_life_tokens: float | None = Field(
        default=1_000_000.0,
        gt=0,
        description="Tokens after which what was sampled counts half; null: all of a router's life counts alike.",
    )
    tracing: StepTracing | None = Field(
        default=None, description="Spans of steps, layers and shards, where vLLM has set up OpenTelemetry."
    )
    observed_tokens: int = Field(
        default=4096, ge=0, description="Sampled tokens of one report to the controller; 0 observes nothing."
    )
    pool: Literal["prefill", "decode"] | None = Field(
        default=None, description="Of two pools of routers, that of this one; shards serve decode first."
    )
    membership: dict[str, Any] | None = Field(
        default=None, description="A fixed membership, for engines that run without the controller."
    )
    membership_by_rpc: bool = Field(
        default=False,
        description="The process that starts the engine sends a membership by collective_rpc before the first request.",
    )


NOT_OFFLOADED = ("vllm_mxfp4",)
"""Kernels whose packed experts nobody but their library can copy."""


class OffloadSettings(StrictModel):
    """Which of a shard's experts are in the kernel's memory; the others are copied there when they are needed."""

    resident_fraction: float = Field(
        gt=0,
        le=1,
        description="Share of a shard's slots that the kernel's memory has room for, rounded up to whole slots of a "
        "layer. With 1 nothing is offloaded.",
    )
    folder: str | None = Field(
        default=None,
        description="CPU shards: folder for the file of all experts as the kernel packs them, on a disk of the shard's "
        "node. The file has no name and ends with the shard. By default the folder for temporary files. Shards on GPUs "
        "keep them in pinned host memory.",
    )
    prefetch: bool = Field(
        default=True, description="Copy what the next layer will probably need before it is asked for."
    )
    max_copy_bytes_per_s: float | None = Field(
        default=None, gt=0, description="Limit on copies into the kernel's memory, such as a slower link has."
    )

    @field_validator("folder")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        if value is not None and not os.path.isabs(value):
            raise ValueError(f"{value!r} is no absolute path, and every shard is in a folder of its own")
        return value


class ShardSettings(StrictModel):
    """Settings of one expert shard."""

    model_path: str = Field(description="Folder of the Hugging Face checkpoint that holds the experts.")
    mtp: bool = Field(default=False, description="Whether to hold the experts of the checkpoint's MTP layer too.")
    dtype: DTypeName = Field(description="Dtype of weights and arithmetic; must be the routers' dtype.")
    device: str = Field(default="cpu", description="Torch device of the experts: cpu, cuda, cuda:1.")
    kernel: str = Field(default="auto", description="Name of a kernel, or auto: the fastest in a trial at start.")
    num_threads: int = Field(default=1, ge=1, description="CPU threads of the kernel.")
    bind_host: str = Field(default="127.0.0.1", description="Address at which routers reach this shard.")
    max_rows_per_dispatch: int = Field(default=2048, ge=1, description="Largest message accepted, in rows.")
    slots_per_rank: int | None = Field(
        default=None, ge=1, description="Slots to allocate in each layer. Defaults to the placement's number."
    )
    spin_us: float = Field(default=50.0, ge=0, description="How long the idle loop yields its core before it sleeps.")
    connect_timeout_s: float = Field(default=30.0, gt=0, description="Limit on one router's handshake.")
    max_handshakes: int = Field(
        default=64, ge=1, description="Connections that are not answered yet; newer ones push out strangers."
    )
    max_pairs: int = Field(
        default=256, ge=1, description="Most pairs with routers at a time; each process of a router has one."
    )
    max_pairs_per_router: int = Field(default=16, ge=1, description="Likewise, for one process of a router.")
    tls: TlsFiles | None = Field(default=None, description="TLS; the routers have to have it too. By default none.")
    offload: OffloadSettings | None = Field(
        default=None, description="More experts than the kernel's memory takes. By default all are in it."
    )
