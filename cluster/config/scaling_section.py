"""The section `scaling` of the controller's user_config: what decides how many shards and routers there are."""

from __future__ import annotations

from pydantic import Field

from experts.protocol.settings import StrictModel


class SloSection(StrictModel):
    """What users should feel at most; means over the autoscaler's window. null: whatever comes."""

    time_per_output_token_ms: float | None = Field(
        default=None, gt=0, description="Milliseconds between two tokens of a stream: asks for shards."
    )
    time_to_first_token_ms: float | None = Field(
        default=None, gt=0, description="Milliseconds from a request to its first token: asks for routers."
    )


class ShardScalingSection(StrictModel):
    """What asks for shards besides the SLO."""

    utilization: float = Field(
        default=0.6, gt=0, le=0.9, description="Share of the time that the busiest shard should compute at most."
    )
    spare: int = Field(
        default=1,
        ge=0,
        description="Shards that may be lost: the others have slots for every expert, and compute at most 0.9 of the "
        "time.",
    )


class RouterScalingSection(StrictModel):
    """What asks for routers besides the SLO."""

    requests: float | None = Field(
        default=None,
        gt=0,
        description="Requests, running or waiting, that a router should have at most. Defaults to 0.8 of max_num_seqs.",
    )
    kv_cache: float = Field(
        default=0.8, gt=0, le=1, description="Share of its KV cache that a router should use at most."
    )


class ScalingSection(StrictModel):
    """When Serve's autoscaler, if `autoscaling_config` names the project's policies, starts and stops replicas."""

    slo: SloSection = Field(default=SloSection(), description="What users should feel at most.")
    shards: ShardScalingSection = Field(default=ShardScalingSection(), description="What asks for shards.")
    routers: RouterScalingSection = Field(default=RouterScalingSection(), description="What asks for routers.")
