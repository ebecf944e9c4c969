"""The section `pools` of the application `llm`: routers that compute prompts, and routers that generate."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from cluster.config.llm_sections import RoutersSection
from experts.kv_transfer.engine_options import Pool, connector_options, transfer_options
from experts.protocol.settings import StrictModel

POOLS: tuple[Pool, ...] = ("prefill", "decode")
KV_TRANSFER = "kv_transfer_config"
_COUNTS = ("num_replicas", "autoscaling_config")


class PoolSection(StrictModel):
    """Routers of one pool: what is set here goes over what `routers` says, key by key."""

    count: int | None = Field(
        default=None, ge=1, description="Number of routers. Defaults to 1, unless deployment_config sets it."
    )
    engine_kwargs: dict[str, Any] = Field(default_factory=dict, description="vLLM engine options of this pool alone.")
    deployment_config: dict[str, Any] = Field(
        default_factory=dict, description="Ray Serve options of this pool's deployment, including autoscaling_config."
    )
    placement_group_config: dict[str, Any] | None = Field(
        default=None, description="Instead of that of `routers`: bundles for this pool's engines."
    )
    env_vars: dict[str, str] = Field(default_factory=dict, description="Environment variables of this pool alone.")
    max_rows_per_dispatch: int | None = Field(
        default=None,
        ge=1,
        description="Most rows in one message of this pool's routers, instead of that of `transport`. What a shard "
        "computes for a prompt cannot be interrupted, so a smaller number in `prefill` has decode routers wait less.",
    )


class PoolsSection(StrictModel):
    """Routers in two pools over the same shards. Requests come to decode routers, which have a prefill router compute
    longer prompts; where none is there, or it takes too long, they compute them themselves."""

    prefill: PoolSection = Field(default=PoolSection(), description="Routers that compute prompts.")
    decode: PoolSection = Field(
        default=PoolSection(), description="Routers that take requests and generate: deployment Router."
    )
    remote_prefill_from_tokens: int = Field(
        default=128,
        ge=1,
        description="Prompts of fewer tokens, estimated from the text, are computed by the decode router itself.",
    )
    prefill_s: float = Field(
        default=30.0,
        gt=0,
        description="A decode router waits so long for a prefill router, and then computes the prompt itself.",
    )
    kv_folder: str = Field(
        default="/dev/shm/expertmesh-kv",
        description="Folder through which prompts' KV cache goes from pool to pool; across hosts one that they share. "
        "It is made if need be, and nobody else may read it.",
    )
    kv_max_bytes: int = Field(
        default=2 << 30, ge=1, description="Most bytes in that folder; what goes beyond is computed by decode routers."
    )
    kv_max_age_s: float = Field(
        default=120.0, gt=0, description="Files of that age are removed: whoever was to read them is gone."
    )

    @field_validator("kv_folder")
    @classmethod
    def _absolute(cls, value: str) -> str:
        if not value.startswith("/"):
            raise ValueError(f"{value!r} is no absolute path, and each router looks for it by itself")
        return value

    @model_validator(mode="after")
    def _patience(self) -> PoolsSection:
        if self.kv_max_age_s <= self.prefill_s:
            raise ValueError(
                f"kv_max_age_s is {self.kv_max_age_s:g}, expected more than prefill_s ({self.prefill_s:g}): files "
                "would go while a request waits for them"
            )
        return self

    def routers_of(self, pool: Pool, routers: RoutersSection) -> RoutersSection:
        """Those of a pool: `routers`, with the pool's own values over it. ValueError if they do not go together."""
        own: PoolSection = getattr(self, pool)
        merged: dict[str, Any] = routers.model_dump(exclude_unset=True)
        for key in ("engine_kwargs", "deployment_config", "env_vars"):
            merged[key] = {**merged.get(key, {}), **getattr(own, key)}
        if own.placement_group_config is not None:
            merged["placement_group_config"] = own.placement_group_config
        if own.count is not None:
            merged["count"] = own.count
        return RoutersSection.model_validate(merged)

    def transfer_options(self, pool: Pool, routers: RoutersSection) -> dict[str, Any]:
        """Engine options by which a pool's engines hand over KV cache."""
        if self.moves_by_own_connector(routers):
            return transfer_options(pool, self.kv_folder, self.kv_max_bytes)
        device = "cuda" if routers.accelerator == "gpu" else "cpu"
        return connector_options(pool, routers.engine_kwargs[KV_TRANSFER], device)

    def moves_by_own_connector(self, routers: RoutersSection) -> bool:
        """Whether KV cache goes through files, and not by a connector that the user names. `routers`: of a pool."""
        return routers.engine_kwargs.get(KV_TRANSFER) is None

    def problems(self, routers: RoutersSection) -> list[str]:
        """One line for each reason why `routers` and its pools do not go together."""
        for key in _COUNTS:
            if key in routers.deployment_config:
                return [f"routers.deployment_config.{key} is set: with pools, each of them has its own"]
        if routers.count is not None:
            return ["routers.count is set: with pools, set pools.prefill.count and pools.decode.count"]
        if routers.expert_signatures is not None:
            return [
                "routers.expert_signatures is set: with pools, prefill routers compute what tells a prompt's experts; "
                "remove one"
            ]
        found, by_files = [], []
        for pool in POOLS:
            try:
                merged = self.routers_of(pool, routers)
            except ValueError as error:
                return [f"pools.{pool}: {_first_message(error)}"]
            told = merged.engine_kwargs.get(KV_TRANSFER)
            if told is not None and not isinstance(told, dict):
                return [f"pools.{pool}: engine_kwargs.{KV_TRANSFER} is {told!r}, expected a mapping"]
            by_files.append(self.moves_by_own_connector(merged))
            if by_files[-1]:
                found += [f"pools.{pool}: {line}" for line in _not_by_files(merged)]
        if by_files[0] != by_files[1]:
            return [f"engine_kwargs.{KV_TRANSFER} is set for one of the pools: set it for both, or for neither"]
        return found


def _not_by_files(routers: RoutersSection) -> list[str]:
    """What the project's own connector does not move."""
    found = []
    other = f"set engine_kwargs.{KV_TRANSFER} of both pools to a connector of vLLM's"
    if routers.accelerator == "gpu":
        found.append(f"accelerator is gpu, but KV cache goes through files between CPUs alone: {other}, NixlConnector")
    if routers.workers > 1:
        found.append(f"tensor_parallel_size is {routers.workers}, expected 1: {other}")
    speculative = routers.engine_kwargs.get("speculative_config")
    method = speculative.get("method") if isinstance(speculative, dict) else None
    if speculative is not None and method != "ngram":
        found.append(f"speculative_config.method is {method!r}, expected ngram: a draft's KV cache does not go along")
    return found


def _first_message(error: ValueError) -> str:
    errors = getattr(error, "errors", None)
    if errors is None:
        return str(error)
    first = errors()[0]
    place, message = ".".join(map(str, first["loc"])), str(first["msg"]).removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
