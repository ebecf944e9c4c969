"""What a router and a shard report about themselves, for health checks, metrics and people.

`to_dict` gives plain data; its keys are those of GET /expertmesh/status. Counters start at 0 with their process.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from experts.protocol.membership import ShardEndpoint
from experts.protocol.plain import exact_fields


@dataclass(frozen=True)
class StageHistogram:
    """How long one stage of a dispatch took."""

    sum: float  # microseconds
    count: int
    buckets: list[int]  # not cumulated; one more than bounds, the last has no upper bound
    bounds: list[int]  # upper bounds, microseconds


@dataclass(frozen=True)
class StageHistograms:
    """The stages of a dispatch in the order they run."""

    plan_pack: StageHistogram
    wait: StageHistogram
    combine: StageHistogram

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> StageHistograms:
        """Inverse of dataclasses.asdict."""
        return cls(
            **{
                stage: StageHistogram(**exact_fields(StageHistogram, histogram))
                for stage, histogram in exact_fields(cls, data).items()
            }
        )


@dataclass(frozen=True)
class RouterStatus:
    """One router. The mesh client fills in the counters; the worker and the deployment add what only they know."""

    router_id: str
    epoch: int  # of the membership in use; -1 before the first
    num_ranks: int
    connected: list[int]  # ranks, ascending
    transports: dict[int, str]  # by connected rank
    lost: dict[int, str]  # why there is no link, by rank
    layers: int  # MoE layers
    steps: int  # engine steps that dispatched rows
    dispatches: int  # MoE layers dispatched
    rows: int  # token rows that went through dispatched layers
    fan_out_sum: int  # shards visited, summed over rows and layers
    failovers: int  # dispatches that repeated rows elsewhere: a shard was lost, or lacked one of their experts
    fallback_pairs: int  # (row, expert) pairs the router computed because no shard had the expert
    bytes_sent: int
    bytes_received: int
    balancedness: float  # mean over max of the ranks' pairs, 0 to 1; 1 before any
    shard_rows: list[int]  # rows sent, by rank
    shard_pairs: list[int]  # (row, expert) pairs sent, by rank
    last_success_age_s: float | None  # since a shard last answered a dispatch; None before the first
    stage_us: StageHistograms
    no_slot_pairs: int = 0  # (layer, expert, rank) left out of an epoch because the shard had no slot for the expert
    uncovered_pairs: int = 0  # (layer, expert) that no live shard has at present
    fallback_ms: float = 0.0  # spent on computing those pairs, and on waiting for their weights
    fallback_cached_bytes: int = 0  # of weights that are at hand for them
    refused_requests: int = 0  # requests whose own rows lacked an expert that there was no time to compute
    swap_last_us: float = 0.0  # how long the last change of epochs held up the steps
    swap_max_us: float = 0.0  # likewise, the longest
    # Added by the vLLM worker.
    params: int = 0  # parameters of the router's model
    resident_bytes: int = 0  # anonymous memory of the worker's process
    # Added by the router's deployment.
    term: str = ""  # life of the controller that gave out the epoch
    pid: int = 0
    unfinished_requests: int = 0  # running or waiting in the engine
    pool: str = ""  # prefill or decode, where routers are in two pools
    prompts_handed_over: int = 0  # that a prefill router computed for this one
    prompts_given_up: int = 0  # that one should have computed, and this one did
    workers: int = 1  # of the engine, whose answers this one is made of

    def to_dict(self) -> dict[str, Any]:
        """Plain data with these fields as keys."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RouterStatus:
        """Inverse of `to_dict`, also after a trip that made keys strings. ValueError names a missing or unknown key."""
        values = exact_fields(cls, data)
        for name in ("transports", "lost"):
            values[name] = {int(rank): text for rank, text in values[name].items()}
        return cls(**{**values, "stage_us": StageHistograms.from_dict(values["stage_us"])})


@dataclass(frozen=True)
class OffloadStatus:
    """A shard that does not keep all of its experts in the kernel's memory. Counters are of experts of a dispatch."""

    kernel: str  # the one that computes
    resident_experts: int  # over all layers
    resident_bytes: int  # of those, as the kernel packs them
    room_bytes: int  # of the memory for resident experts
    hits: int  # experts that were resident when they were needed
    misses: int  # those that had to be waited for
    copied_bytes: int  # into that memory
    copy_seconds: float  # that those copies took, added up over threads
    wait_seconds: float  # in which dispatches waited for copies
    prefetched: int  # experts copied before they were needed
    prefetches_wasted: int  # of those, evicted without a use
    copy_bytes_per_s: float  # at which copies came, lately; 0.0 before the first


@dataclass(frozen=True)
class ShardStatus:
    """One shard that serves."""

    rank: int
    epoch: int  # at which it started
    pid: int
    incarnation: str
    endpoint: ShardEndpoint
    alive: bool  # the compute loop runs
    fault: str | None  # why no request can be answered any more although the loop runs
    routers: list[str]  # ids of the connected routers
    kernel: str
    loaded_experts: int  # over all layers
    loaded_bytes: int  # of expert weights
    weights_digest: str
    requests: int  # dispatches answered
    rows: int
    pairs: int  # (row, expert) pairs computed
    errors: int
    compute_ns: int
    last_error: str | None
    last_epoch: int  # of the last request answered; -1 before the first
    num_slots: int = 0  # of each layer
    free_slots: int = 0  # over all layers
    # Copies of experts into this shard since it started; sources are shm, tcp and checkpoint.
    copies: dict[str, int] = field(default_factory=dict)  # done, by source
    copied_bytes: dict[str, int] = field(default_factory=dict)  # by source
    copies_failed: int = 0
    copies_in_flight: int = 0
    copy_seconds: float = 0.0  # in which copies ran
    handed_out: int = 0  # experts that other shards copied from here
    handed_out_bytes: int = 0
    offload: OffloadStatus | None = None  # None: all experts are in the kernel's memory

    def to_dict(self) -> dict[str, Any]:
        """Plain data with these fields as keys."""
        return asdict(self)
