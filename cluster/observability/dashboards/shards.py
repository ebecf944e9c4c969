"""One shard beside the others: state, memory, work, copies, experts beyond memory."""

from __future__ import annotations

from cluster.observability.dashboards.model import APPLICATION, NAMESPACE, RANK, Dashboard, Panel, Query, Row
from cluster.observability.dashboards.queries import OURS, SHARDS, max_by, rate_by, selected

_SERVING = selected('state="serving"', SHARDS)
IDLE = "no shard computed anything in the last minutes"


def _by_rank(title: str, description: str, unit: str, name: str, **more: object) -> Panel:
    return Panel(title, description, unit, (Query(max_by("rank", name, SHARDS), "rank {{rank}}"),), **more)  # type: ignore[arg-type]


def _rate(title: str, description: str, unit: str, name: str, **more: object) -> Panel:
    return Panel(title, description, unit, (Query(rate_by("rank", name, SHARDS), "rank {{rank}}"),), **more)  # type: ignore[arg-type]


STATE = Row(
    "State",
    (
        Panel(
            "Ranks missing",
            "Ranks at which no shard serves.",
            "short",
            (Query(f"max(ray_expertmesh_ranks_missing{OURS})", "missing"),),
            "stat",
            warn=1,
            bad=2,
        ),
        Panel(
            "Sole copies",
            "Experts of a layer that one shard alone serves.",
            "short",
            (Query(f"max(ray_expertmesh_experts_sole{OURS})", "sole"),),
            "stat",
        ),
        Panel(
            "Shards that serve",
            "With all experts of their targets.",
            "short",
            (
                Query(
                    f"sum(max by (application, rank) (ray_expertmesh_rank_state{_SERVING}))",
                    "serving",
                ),
            ),
            "stat",
        ),
        Panel(
            "Shards by state",
            "joining: starts; filling: copies its experts; serving; draining: hands its experts on.",
            "short",
            (
                Query(
                    f"sum by (state) (max by (application, rank, state) (ray_expertmesh_rank_state{SHARDS}))",
                    "{{state}}",
                ),
            ),
            stacked=True,
        ),
        _by_rank(
            "Experts that are missing",
            "In the target of the rank and not on its shard: what is still to be copied there.",
            "short",
            "ray_expertmesh_rank_experts_missing",
        ),
        _by_rank(
            "Experts held",
            "Over all layers, as the controller knows it.",
            "short",
            "ray_expertmesh_rank_experts_held",
        ),
        _by_rank("Connected routers", "Routers with a pair to the shard.", "short", "ray_expertmesh_shard_routers"),
    ),
)

MEMORY = Row(
    "Memory",
    (
        _by_rank(
            "Expert weights",
            "Bytes of the experts in the shard's slots, in the kernel's format.",
            "bytes",
            "ray_expertmesh_shard_loaded_bytes",
        ),
        _by_rank(
            "Memory of the process",
            "Anonymous memory of the host: weights on CPUs, buffers of pairs.",
            "bytes",
            "ray_expertmesh_shard_resident_bytes",
        ),
        _by_rank(
            "Memory of the GPU",
            "What the shard's process has reserved there.",
            "bytes",
            "ray_expertmesh_shard_device_bytes",
            may_be_empty="shards run on CPUs",
        ),
        _by_rank("Experts loaded", "Over all layers, as the shard says.", "short", "ray_expertmesh_shard_experts"),
        _by_rank("Slots of a layer", "What each shard has room for.", "short", "ray_expertmesh_shard_slots"),
        _by_rank(
            "Free slots",
            "Over all layers. A migration needs some to begin with.",
            "short",
            "ray_expertmesh_shard_slots_free",
        ),
    ),
)

WORK = Row(
    "Work",
    (
        _rate(
            "Kernel share of time",
            "Share of time in which the shard computes. Near 1 it is the limit; the others wait for the fullest one.",
            "percentunit",
            "ray_expertmesh_shard_compute_seconds_total",
            warn=0.8,
            bad=0.95,
            most=1,
        ),
        _rate("Rows/s", "Token rows that the shard computed.", "short", "ray_expertmesh_shard_rows_total"),
        _rate("Pairs/s", "Row-expert pairs that the shard computed.", "short", "ray_expertmesh_shard_pairs_total"),
        _rate(
            "Dispatches/s", "Requests of routers that the shard answered.", "ops", "ray_expertmesh_shard_requests_total"
        ),
        Panel(
            "Time of a dispatch",
            "Mean time from a request to its sums; requests of several routers for one layer are computed together.",
            "s",
            (
                Query(
                    f"{rate_by('rank', 'ray_expertmesh_shard_compute_seconds_total', SHARDS)} / "
                    f"{rate_by('rank', 'ray_expertmesh_shard_requests_total', SHARDS)}",
                    "rank {{rank}}",
                ),
            ),
            may_be_empty=IDLE,
        ),
        _rate(
            "Errors/s",
            "Requests that the shard could not answer; `last_error` in /expertmesh/status says why.",
            "ops",
            "ray_expertmesh_shard_errors_total",
            warn=0.001,
        ),
    ),
)

COPIES = Row(
    "Copies",
    (
        Panel(
            "Copies by source",
            "process: read from another shard's memory; shm, tcp: sent by it; checkpoint: read from storage.",
            "ops",
            (Query(rate_by("source", "ray_expertmesh_shard_copies_total", SHARDS), "{{source}}"),),
            stacked=True,
        ),
        Panel(
            "Copied by source",
            "Bytes a second into the shards.",
            "Bps",
            (Query(rate_by("source", "ray_expertmesh_shard_copied_bytes_total", SHARDS), "{{source}}"),),
            stacked=True,
        ),
        _by_rank("Copies in flight", "Into the shard.", "short", "ray_expertmesh_shard_copies_in_flight"),
        _rate(
            "Share of time with copies",
            "In which copies into the shard run.",
            "percentunit",
            "ray_expertmesh_shard_copy_seconds_total",
        ),
        _rate(
            "Handed out",
            "Bytes a second that other shards copy from this one.",
            "Bps",
            "ray_expertmesh_shard_handed_out_bytes_total",
        ),
        _rate(
            "Failed copies",
            "Into the shard, a second. The controller plans anew.",
            "ops",
            "ray_expertmesh_shard_failed_copies_total",
            warn=0.001,
        ),
    ),
)

NOT_OFFLOADED = "only shards with shards.offload have it"
_HITS = rate_by("rank", "ray_expertmesh_shard_offload_hits_total", SHARDS)
_MISSES = rate_by("rank", "ray_expertmesh_shard_offload_misses_total", SHARDS)
_COPIED = rate_by("rank", "ray_expertmesh_shard_offload_copied_bytes_total", SHARDS)
_COPYING = rate_by("rank", "ray_expertmesh_shard_offload_copy_seconds_total", SHARDS)

OFFLOAD = Row(
    "More experts than memory",
    (
        Panel(
            "Hit rate",
            "Experts of dispatches that were in the kernel's memory when they were needed.",
            "percentunit",
            (Query(f"{_HITS} / ({_HITS} + {_MISSES})", "rank {{rank}}"),),
            most=1,
            may_be_empty=NOT_OFFLOADED,
        ),
        _rate(
            "Waiting for experts",
            "Share of time in which dispatches waited for copies of experts.",
            "percentunit",
            "ray_expertmesh_shard_offload_wait_seconds_total",
            may_be_empty=NOT_OFFLOADED,
        ),
        _rate(
            "Copied into the kernel's memory",
            "Bytes a second, those fetched early among them.",
            "Bps",
            "ray_expertmesh_shard_offload_copied_bytes_total",
            may_be_empty=NOT_OFFLOADED,
        ),
        Panel(
            "Speed of those copies",
            "Bytes by the time that their copies took: what the disk, or the link to the GPU, gives.",
            "Bps",
            (Query(f"{_COPIED} / {_COPYING}", "rank {{rank}}"),),
            may_be_empty=NOT_OFFLOADED,
        ),
        _rate(
            "Fetched early",
            "Experts a second that were copied before a dispatch needed them.",
            "ops",
            "ray_expertmesh_shard_offload_prefetched_total",
            may_be_empty=NOT_OFFLOADED,
        ),
        _rate(
            "Fetched early in vain",
            "Of those, the ones that were evicted without a use.",
            "ops",
            "ray_expertmesh_shard_offload_prefetches_wasted_total",
            may_be_empty=NOT_OFFLOADED,
        ),
        _by_rank(
            "Resident",
            "Bytes of experts in the kernel's memory.",
            "bytes",
            "ray_expertmesh_shard_offload_resident_bytes",
            may_be_empty=NOT_OFFLOADED,
        ),
    ),
)

SHARDS_PAGE = Dashboard(
    "shards",
    "expertmesh: shards",
    "One shard beside the others: state, memory, work, copies, experts beyond memory.",
    (NAMESPACE, APPLICATION, RANK),
    (STATE, MEMORY, WORK, COPIES, OFFLOAD),
)
