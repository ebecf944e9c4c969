"""The sections `routers`, `transport` and `deadlines` of the application `llm`; `http` is in `http_sections`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationInfo, field_validator, model_validator

from experts.protocol.settings import RouterSettings, StepTracing, StrictModel, TlsFiles, TransportName
from experts.vllm_plugin.engine_options import refused_by_project


def _router_default(name: str) -> Any:
    return RouterSettings.model_fields[name].default


class FallbackSection(StrictModel):
    """The limits of a router that computes experts without a live shard. Requests beyond them end with status 503."""

    max_ms_per_step: float = Field(
        default=_router_default("fallback_max_ms_per_step"),
        ge=0,
        description="Most milliseconds of an engine's step; 0: nothing is computed.",
    )
    cache_bytes: int = Field(
        default=_router_default("fallback_cache_bytes"),
        ge=0,
        description="Bytes of expert weights that are kept, in the model's dtype, on the router's device.",
    )


class TracingSection(StepTracing):
    """OpenTelemetry spans of requests, steps, layers and shards. Headers, certificates and the like of the exporter are
    in its standard environment variables (OTEL_EXPORTER_OTLP_HEADERS, OTEL_RESOURCE_ATTRIBUTES)."""

    otlp_endpoint: str = Field(description="Where spans go, OTLP over HTTP, such as http://collector:4318/v1/traces.")
    sample_ratio: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Share of requests that are traced, of those without a traceparent header, which decides itself.",
    )

    @field_validator("otlp_endpoint")
    @classmethod
    def _whole(cls, value: str) -> str:
        url = urlsplit(value)
        if url.scheme not in ("http", "https") or not url.netloc:
            raise ValueError(f"{value!r} is no http:// or https:// URL")
        if url.path in ("", "/"):
            raise ValueError(f"{value!r} has no path; a collector takes spans at {url.scheme}://{url.netloc}/v1/traces")
        return value

    def environment(self) -> dict[str, str]:
        """What the SDK and vLLM read, in the router's process and in its engine's."""
        return {
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": self.otlp_endpoint,
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
            "OTEL_TRACES_SAMPLER_ARG": str(self.sample_ratio),
            "OTEL_SERVICE_NAME": "expertmesh",
        }

    def of_steps(self) -> StepTracing:
        """The part that the engine's worker has to know."""
        return StepTracing(step_interval=self.step_interval, layers_per_step=self.layers_per_step)


class SignaturesSection(StrictModel):
    """Requests whose prompts take the same experts go to the same router, so that a step uses fewer of them. Needs
    several routers, and HAProxy."""

    max_lead: int = Field(
        default=8,
        ge=1,
        description="Open requests by which a router that gets a request may be ahead of the one with the fewest, "
        "counting that request.",
    )
    min_similarity: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="Cosine between the text of a request and the nearest remembered prompt, below which load decides.",
    )
    remembered_prompts: int = Field(
        default=512,
        ge=64,
        le=4096,
        description="Prompts whose experts each request router remembers, the newest ones: 2.3 KB each in memory.",
    )
    report_s: float = Field(
        default=5.0,
        ge=0.5,
        description="Seconds between a router's reports of its prompts' experts, up to 20 KB each, over Serve's "
        "controller.",
    )


class RoutersSection(StrictModel):
    """The routers: replicas of Ray Serve LLM, each with a vLLM engine that holds no expert weights."""

    count: int | None = Field(
        default=None, ge=1, description="Number of routers. Defaults to 1, unless deployment_config sets it."
    )
    accelerator: Literal["cpu", "gpu"] = Field(default="cpu", description="Hardware the engines run on.")
    accelerator_type: str | None = Field(default=None, description="Ray's name of the GPU, such as H100.")
    engine_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="vLLM engine options, as Ray Serve LLM takes them."
    )
    deployment_config: dict[str, Any] = Field(
        default_factory=dict, description="Ray Serve options of the deployment, including autoscaling_config."
    )
    placement_group_config: dict[str, Any] | None = Field(
        default=None, description="Ray Serve LLM's bundles for an engine's workers: bundle_per_worker or bundles."
    )
    llm_config: dict[str, Any] = Field(
        default_factory=dict,
        description="Other fields of Ray Serve LLM's LLMConfig: experimental_configs, callback_config.",
    )
    env_vars: dict[str, str] = Field(default_factory=dict, description="Environment variables of routers and engines.")
    trace_tokens: int = Field(
        default=_router_default("trace_tokens"),
        ge=0,
        description="Number of tokens whose routing decisions a router keeps for `GET /expertmesh/trace`; 0 turns "
        "recording off.",
    )
    trace_half_life_tokens: float | None = Field(
        default=_router_default("trace_half_life_tokens"),
        gt=0,
        description="Tokens after which a recorded one counts half. null: all since the router started count alike.",
    )
    observed_tokens: int = Field(
        default=_router_default("observed_tokens"),
        ge=0,
        description="Tokens whose routing decisions go into one report to the controller, whole steps of up to 512 "
        "tokens, beside exact counts of all; 0 reports nothing, and the autopilot sees nothing of this router.",
    )
    fallback: FallbackSection = Field(
        default=FallbackSection(), description="What a router computes itself because no shard holds it."
    )
    tracing: TracingSection | None = Field(default=None, description="OpenTelemetry; by default none.")
    expert_signatures: SignaturesSection | None = Field(
        default=None,
        description="Which router gets a request, by the experts that its prompt takes; by default the one with the "
        "fewest open requests.",
    )

    @property
    def workers(self) -> int:
        """Workers of one engine, each on a GPU of its own, or with cores of its own (tensor parallelism)."""
        return int(self.engine_kwargs.get("tensor_parallel_size", 1))

    @field_validator("engine_kwargs")
    @classmethod
    def _owned_engine_options(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        for problem in refused_by_project(value, "cuda" if info.data.get("accelerator") == "gpu" else "cpu"):
            raise ValueError(problem)
        return value

    @field_validator("llm_config")
    @classmethod
    def _owned_llm_options(cls, value: dict[str, Any]) -> dict[str, Any]:
        own_place = (
            "model_loading_config engine_kwargs deployment_config placement_group_config accelerator_type server_cls "
            "accelerator_config runtime_env lora_config"
        )
        for key in own_place.split():
            if key in value:
                raise ValueError(f"{key} has a key of its own in this config, or is set by the project")
        return value

    @model_validator(mode="after")
    def _one_way_to_trace(self) -> RoutersSection:
        for key, why in (
            ("otlp_traces_endpoint", "tracing.otlp_endpoint sets it"),
            ("disable_log_stats", "vLLM's spans are made of its statistics"),
        ):
            if self.tracing is not None and self.engine_kwargs.get(key):
                raise ValueError(f"engine_kwargs.{key} and tracing are both set: {why}")
        return self

    @model_validator(mode="after")
    def _one_request_router(self) -> RoutersSection:
        if self.expert_signatures is not None and self.deployment_config.get("request_router_config") is not None:
            raise ValueError(
                "expert_signatures and deployment_config.request_router_config are both set: each says which router "
                "gets a request; set one"
            )
        return self

    @model_validator(mode="after")
    def _one_count(self) -> RoutersSection:
        given = [key for key in ("num_replicas", "autoscaling_config") if key in self.deployment_config]
        if self.count is not None and given:
            raise ValueError(f"count and deployment_config.{given[0]} are both set; set one")
        return self


class LoraSection(StrictModel):
    """LoRA adapters, as Ray Serve LLM's `lora_config` has them: a request for the model `ID:NAME` is answered with the
    adapter in the folder NAME, which each router loads when it is first asked for it. Engine options for adapters
    (max_lora_rank, max_loras, lora_dtype, ...) are in routers.engine_kwargs."""

    dynamic_lora_loading_path: str = Field(
        min_length=1,
        description="Folder of adapters, each a folder as PEFT saves it: on every node the same, or an `s3://` or "
        "`gs://` folder. A relative path is looked up as model.path is.",
    )
    max_num_adapters_per_replica: int = Field(
        default=16,
        ge=1,
        description="Most adapters that a router holds; one that is not in use makes room. The engine's max_loras, "
        "unless that is set: requests of so many adapters share a step.",
    )
    download_timeout_s: float | None = Field(
        default=30.0, gt=0, description="Time-out for fetching one adapter; null: none."
    )
    max_download_tries: int = Field(
        default=3, ge=1, description="How often fetching is tried while the object store does not answer."
    )

    @field_validator("dynamic_lora_loading_path")
    @classmethod
    def _folder(cls, value: str) -> str:
        if not value.startswith(("/", "s3://", "gs://")):
            raise ValueError(f"{value!r} is no folder here, and no s3:// or gs:// folder")
        return value.rstrip("/")

    @property
    def folder(self) -> Path | None:
        """The folder, if it is none of an object store."""
        path = self.dynamic_lora_loading_path
        return Path(path) if path.startswith("/") else None

    def engine_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """vLLM's engine options for adapters, beside those that the user gives."""
        most = self.max_num_adapters_per_replica
        max_loras = options.get("max_loras", most)
        return {"enable_lora": True, "max_loras": max_loras, "max_cpu_loras": max(most, max_loras)}


class TransportSection(StrictModel):
    """How rows travel between routers and shards."""

    name: TransportName = Field(
        default=_router_default("transport"),
        description="auto: between GPUs CUDA IPC within a host where they map each other's memory, else NCCL; else "
        "shared memory within a host, TCP across hosts.",
    )
    max_rows_per_dispatch: int = Field(
        default=_router_default("max_rows_per_dispatch"),
        ge=1,
        description="Most rows in one message; a larger step is sent in several rounds.",
    )
    spin_us: float = Field(
        default=_router_default("spin_us"), ge=0, description="Microseconds a wait yields its core before it sleeps."
    )
    prefer_local_replicas: bool = Field(
        default=_router_default("prefer_local_replicas"),
        description="Use replicas on the router's own host first, whatever their load. For hosts that each have a "
        "router and an equal share of the requests.",
    )
    reserve_for_shards: int = Field(
        default=_router_default("reserve_for_shards"),
        ge=0,
        description="On GPUs: the most shards there will be. vLLM leaves memory for the pairs with so many, and for "
        "routers.fallback.cache_bytes, when it sizes its KV cache.",
    )
    tls: TlsFiles | None = Field(
        default=None,
        description="TLS for everything that routers and shards say to each other over the network; mesh.tls is the "
        "shards' side. Rows in shared memory do not leave the host. By default rows are not encrypted.",
    )

    @model_validator(mode="after")
    def _encrypted(self) -> TransportSection:
        if self.tls is not None and self.name == "nccl":
            raise ValueError("name is nccl, which does not encrypt: with tls, name is tcp, shm or auto")
        return self


class DeadlinesSection(StrictModel):
    """Time-outs of everything a router waits for. Each is a duration; a wait's deadline is its start plus this."""

    dispatch_ms: float = Field(
        default=_router_default("dispatch_timeout_ms"),
        gt=0,
        description="A shard that has not answered a dispatch after this long is given up for the epoch.",
    )
    connect_s: float = Field(
        default=_router_default("connect_timeout_s"), gt=0, description="Time-out for connecting a router to one shard."
    )
    membership_s: float = Field(
        default=600.0,
        gt=0,
        description="Longest time a starting router waits for shards; on a cold start, for all of them.",
    )
    apply_s: float = Field(
        default=120.0, gt=0, description="Time-out for a call to an engine's workers, such as a new epoch."
    )
    probe_s: float = Field(default=10.0, gt=0, description="Time-out for the token that /health generates.")
