"""The arguments of the applications, and the settings that routers and shards get from them."""

from __future__ import annotations

from typing import Any

from pydantic import Field, PrivateAttr, model_validator

from cluster.config.experts_sections import ControllerSection, MeshSection, ShardsSection
from cluster.config.http_sections import ConsoleHttpSection, HttpSection
from cluster.config.llm_sections import DeadlinesSection, LoraSection, RoutersSection, TransportSection
from cluster.config.model_section import ModelSection
from cluster.config.pools.section import POOLS, PoolsSection
from experts.kv_transfer.engine_options import Pool
from experts.protocol.settings import RouterSettings, ShardSettings, StrictModel
from experts.vllm_plugin.engine_kwargs import router_engine_kwargs
from experts.vllm_plugin.engine_options import refused_without_mtp


class ExpertsAppConfig(StrictModel):
    """Arguments of `serve_app:build_experts`: what a change of restarts shards and controller."""

    model: ModelSection = Field(description="The model; the same in both applications.")
    shards: ShardsSection = Field(default=ShardsSection(), description="The expert shards.")
    controller: ControllerSection = Field(default=ControllerSection(), description="The placement controller.")
    mesh: MeshSection = Field(default=MeshSection(), description="Who may take part in the mesh.")

    def shard_settings(self, bind_host: str, num_slots: int) -> ShardSettings:
        """Settings of one shard with `num_slots` slots a layer; `bind_host` is where routers reach it."""
        return ShardSettings(
            model_path=self.model.path,
            mtp=self.model.mtp,
            dtype=self.model.dtype,
            device=self.shards.device,
            kernel=self.shards.kernel,
            num_threads=self.shards.num_threads,
            bind_host=bind_host,
            max_rows_per_dispatch=self.shards.max_rows_per_dispatch,
            slots_per_rank=num_slots,
            spin_us=self.shards.spin_us,
            connect_timeout_s=self.shards.connect_s,
            max_handshakes=self.shards.max_handshakes,
            max_pairs=self.shards.max_pairs,
            max_pairs_per_router=self.shards.max_pairs_per_router,
            tls=self.mesh.tls,
            offload=self.shards.offload,
        )


class LLMAppConfig(StrictModel):
    """Arguments of `serve_app:build_llm`: the routers and the HTTP side."""

    model: ModelSection = Field(description="The model; the same in both applications.")
    routers: RoutersSection = Field(default=RoutersSection(), description="The vLLM engines.")
    pools: PoolsSection | None = Field(
        default=None, description="Prefill and decode routers apart; by default every router does both."
    )
    lora_config: LoraSection | None = Field(default=None, description="LoRA adapters; by default none.")
    transport: TransportSection = Field(
        default=TransportSection(), description="How rows travel between routers and shards."
    )
    deadlines: DeadlinesSection = Field(default=DeadlinesSection(), description="Time-outs of the routers.")
    http: HttpSection = Field(default=HttpSection(), description="API keys, queue limit, health checks.")
    experts_app: str = Field(
        default="experts", min_length=1, description="Name of the application that holds the shards."
    )

    _pool: Pool | None = PrivateAttr(default=None)

    @property
    def pool(self) -> Pool | None:
        """Whose config this is, if it was made by `of_pool`."""
        return self._pool

    def of_pool(self, pool: Pool) -> LLMAppConfig:
        """The same for the routers of one pool. ValueError without the section `pools`."""
        if self.pools is None:
            raise ValueError(f"there is no section pools, so no pool {pool}")
        own = getattr(self.pools, pool).max_rows_per_dispatch
        transport = self.transport if own is None else self.transport.model_copy(update={"max_rows_per_dispatch": own})
        made = self.model_copy(update={"routers": self.pools.routers_of(pool, self.routers), "transport": transport})
        made._pool = pool
        return made

    @property
    def each_pool(self) -> list[LLMAppConfig]:
        """The configs of both pools; without them, this one."""
        return [self] if self.pools is None else [self.of_pool(pool) for pool in POOLS]

    @model_validator(mode="after")
    def _pools_fit(self) -> LLMAppConfig:
        for problem in [] if self.pools is None else self.pools.problems(self.routers):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _mtp_layer_on_shards(self) -> LLMAppConfig:
        for problem in () if self.model.mtp else refused_without_mtp(self.routers.engine_kwargs):
            raise ValueError(f"routers.engine_kwargs.{problem}")
        return self

    @model_validator(mode="after")
    def _one_way_to_adapters(self) -> LLMAppConfig:
        enabled = self.routers.engine_kwargs.get("enable_lora")
        if enabled and self.lora_config is None:
            raise ValueError(
                "routers.engine_kwargs.enable_lora is true, but there is no lora_config to say where adapters are"
            )
        if enabled is False and self.lora_config is not None:
            raise ValueError("routers.engine_kwargs.enable_lora is false, but lora_config is set: remove one")
        return self

    def router_settings(self) -> RouterSettings:
        """Settings of one router's vLLM worker."""
        return RouterSettings(
            model_path=self.model.path,
            mtp=self.model.mtp,
            transport=self.transport.name,
            dispatch_timeout_ms=self.deadlines.dispatch_ms,
            connect_timeout_s=self.deadlines.connect_s,
            max_rows_per_dispatch=self.transport.max_rows_per_dispatch,
            spin_us=self.transport.spin_us,
            prefer_local_replicas=self.transport.prefer_local_replicas,
            trace_tokens=self.routers.trace_tokens,
            trace_half_life_tokens=self.routers.trace_half_life_tokens,
            observed_tokens=self.routers.observed_tokens,
            fallback_cache_bytes=self.routers.fallback.cache_bytes,
            fallback_max_ms_per_step=self.routers.fallback.max_ms_per_step,
            reserve_for_shards=self.transport.reserve_for_shards,
            tls=self.transport.tls,
            tracing=None if self.routers.tracing is None else self.routers.tracing.of_steps(),
            membership_by_rpc=True,
            pool=self.pool,
        )

    def engine_kwargs(self) -> dict[str, Any]:
        """The user's engine options plus those the project sets: dtype, worker extension, router settings."""
        device = "cuda" if self.routers.accelerator == "gpu" else "cpu"
        options = {**self.routers.engine_kwargs, "dtype": self.model.dtype}
        if self.routers.tracing is not None:
            options["otlp_traces_endpoint"] = self.routers.tracing.otlp_endpoint
        if self.lora_config is not None:
            options |= {**self.lora_config.engine_options(options), **options}
        if self.pools is not None and self.pool is not None:
            options |= self.pools.transfer_options(self.pool, self.routers)
        return router_engine_kwargs(self.router_settings(), options, device)


class ConsoleAppConfig(StrictModel):
    """Arguments of `serve_app:build_console`: status, placement, traces and metrics, for people and their tools."""

    experts_app: str = Field(
        default="experts", min_length=1, description="Name of the application that holds the shards."
    )
    llm_apps: list[str] = Field(
        default=["llm"], min_length=1, description="Names of the applications that hold the routers."
    )
    http: ConsoleHttpSection = Field(default=ConsoleHttpSection(), description="API keys and admin keys.")
    deployment_config: dict[str, Any] = Field(
        default_factory=dict,
        description="Ray Serve options of the deployment, including num_replicas and ray_actor_options.",
    )
