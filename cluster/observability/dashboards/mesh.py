"""What stands between routers and shards: stages of a layer, placement, faults, migration, autopilot."""

from __future__ import annotations

from cluster.observability.dashboards.model import APPLICATION, NAMESPACE, ROUTER, Dashboard, Panel, Query, Row
from cluster.observability.dashboards.moves import AUTOPILOT, MIGRATION
from cluster.observability.dashboards.queries import OURS, RATE, ROUTERS, max_by, quantiles, rate_by, selected

_ALL = selected('le="+Inf"', ROUTERS)
_COUNT = f"ray_expertmesh_dispatch_stages_within_total{_ALL}"

GLANCE = Row(
    "At a glance",
    (
        Panel(
            "Ranks missing",
            "Ranks at which no shard serves. Their experts are served by replicas elsewhere, or by the fallback.",
            "short",
            (Query(f"max(ray_expertmesh_ranks_missing{OURS})", "missing"),),
            "stat",
            warn=1,
            bad=2,
        ),
        Panel(
            "Experts unserved",
            "Experts of a layer that no shard serves: routers compute them or refuse requests.",
            "short",
            (Query(f"max(ray_expertmesh_experts_unserved{OURS})", "unserved"),),
            "stat",
            warn=1,
            bad=1,
        ),
        Panel(
            "Sole copies",
            "Experts of a layer that one shard alone serves. With no shard missing that is the placement's choice.",
            "short",
            (Query(f"max(ray_expertmesh_experts_sole{OURS})", "sole"),),
            "stat",
        ),
        Panel(
            "Epoch",
            "Version of the placement and its live shards that the controller gives out.",
            "none",
            (Query(f"max(ray_expertmesh_controller_epoch{OURS})", "epoch"),),
            "stat",
        ),
        Panel(
            "Controller last looked",
            "Seconds since the controller looked at its shards; the alert ControllerDown fires from 60 on.",
            "s",
            (Query(f"time() - max(ray_expertmesh_controller_looked_timestamp_seconds{OURS})", "ago"),),
            "stat",
            warn=30,
            bad=60,
        ),
        Panel(
            "Steps/s",
            "Steps of all engines that dispatched rows.",
            "short",
            (Query(f"sum(rate(ray_expertmesh_steps_total{ROUTERS}{RATE}))", "steps/s"),),
            "stat",
        ),
    ),
)

STAGES = Row(
    "Stages of a layer",
    (
        Panel(
            "Mean time of a stage",
            "plan_pack and combine are the router's own; wait is the shards and the way there.",
            "s",
            (
                Query(
                    f"{rate_by('stage', 'ray_expertmesh_dispatch_stage_seconds_total', ROUTERS)} / "
                    f"sum by (stage) (rate({_COUNT}{RATE}))",
                    "{{stage}}",
                ),
            ),
            stacked=True,
        ),
        Panel(
            "p99 of a stage",
            "One layer in a hundred takes longer.",
            "s",
            quantiles("ray_expertmesh_dispatch_stages_within_total", ROUTERS, "stage", 0.99),
        ),
        Panel(
            "Share of time in MoE layers",
            "Of each router's time, all stages. What is left of it are attention, sampling and idling.",
            "percentunit",
            (
                Query(
                    rate_by("replica, stage", "ray_expertmesh_dispatch_stage_seconds_total", ROUTERS),
                    "{{replica}} {{stage}}",
                ),
            ),
            stacked=True,
        ),
        Panel(
            "Dispatches/s",
            "MoE layers dispatched: steps times layers.",
            "ops",
            (Query(rate_by("replica", "ray_expertmesh_dispatches_total", ROUTERS), "{{replica}}"),),
        ),
        Panel(
            "Rows a dispatch",
            "Token rows in one layer of one step: the batch.",
            "short",
            (
                Query(
                    f"{rate_by('replica', 'ray_expertmesh_rows_total', ROUTERS)} / "
                    f"{rate_by('replica', 'ray_expertmesh_dispatches_total', ROUTERS)}",
                    "{{replica}}",
                ),
            ),
        ),
        Panel(
            "Bytes on the wire",
            "Rows to shards and sums back, all routers.",
            "Bps",
            (
                Query(f"sum(rate(ray_expertmesh_sent_bytes_total{ROUTERS}{RATE}))", "sent"),
                Query(f"sum(rate(ray_expertmesh_received_bytes_total{ROUTERS}{RATE}))", "received"),
            ),
        ),
        Panel(
            "Prompts of decode routers",
            "Prompts a second that a prefill router computed, and those left to decode routers for want of one.",
            "reqps",
            (Query(rate_by("by", "ray_expertmesh_prompts_total", ROUTERS), "by {{by}} routers"),),
            stacked=True,
            may_be_empty="there are no pools",
        ),
    ),
)


PLACEMENT = Row(
    "Placement",
    (
        Panel(
            "Fan-out",
            "Shards that a token visits in a layer. A placement planned on a trace of your traffic lowers it.",
            "short",
            (
                Query(
                    f"{rate_by('replica', 'ray_expertmesh_visits_total', ROUTERS)} / "
                    f"{rate_by('replica', 'ray_expertmesh_rows_total', ROUTERS)}",
                    "{{replica}}",
                ),
            ),
        ),
        Panel(
            "Balancedness",
            "Mean over max of the shards' load in row-expert pairs, since the epoch began; 1 is perfect.",
            "percentunit",
            (Query(max_by("replica", "ray_expertmesh_balancedness", ROUTERS), "{{replica}}"),),
            warn=0.8,
            bad=0.6,
            falling=True,
            most=1,
        ),
        Panel(
            "Pairs sent by rank",
            "Row-expert pairs a second: the load of each shard as routers see it.",
            "short",
            (Query(rate_by("rank", "ray_expertmesh_sent_pairs_total", ROUTERS), "rank {{rank}}"),),
            stacked=True,
        ),
        Panel(
            "Rows sent by rank",
            "Token rows a second; the rows of one token go to a shard once.",
            "short",
            (Query(rate_by("rank", "ray_expertmesh_sent_rows_total", ROUTERS), "rank {{rank}}"),),
            stacked=True,
        ),
        Panel(
            "Epochs",
            "Routers follow the controller within a second; one that stays behind cannot reach a shard.",
            "none",
            (
                Query(max_by("application", "ray_expertmesh_controller_epoch", OURS), "controller"),
                Query(max_by("replica", "ray_expertmesh_epoch", ROUTERS), "{{replica}}"),
            ),
        ),
        Panel(
            "Longest stop for a new epoch",
            "What routers' steps were held up by the change of epochs, since they started.",
            "s",
            (Query(max_by("replica", "ray_expertmesh_swap_max_seconds", ROUTERS), "{{replica}}"),),
            warn=0.01,
        ),
    ),
)

FAULTS = Row(
    "Faults",
    (
        Panel(
            "Failovers",
            "Dispatches whose rows were repeated on other shards, in a second.",
            "ops",
            (Query(rate_by("replica", "ray_expertmesh_failovers_total", ROUTERS), "{{replica}}"),),
        ),
        Panel(
            "Fallback",
            "Row-expert pairs a second that routers compute themselves; after five minutes FallbackInUse fires.",
            "short",
            (Query(rate_by("replica", "ray_expertmesh_fallback_pairs_total", ROUTERS), "{{replica}}"),),
            warn=1,
        ),
        Panel(
            "Time in the fallback",
            "Share of each router's time, waiting for weights included.",
            "percentunit",
            (Query(rate_by("replica", "ray_expertmesh_fallback_seconds_total", ROUTERS), "{{replica}}"),),
            warn=0.05,
            bad=0.2,
        ),
        Panel(
            "Connected shards",
            "By router. Fewer than ranks: its log and `errors` in /expertmesh/status say why.",
            "short",
            (
                Query(f"sum by (replica) (ray_expertmesh_shard_connected{ROUTERS})", "{{replica}}"),
                Query(max_by("application", "ray_expertmesh_ranks", OURS), "ranks"),
            ),
        ),
        Panel(
            "Experts that a router finds nowhere",
            "Experts of a layer on no live shard, as each router sees it; and those given up for an epoch, a second.",
            "short",
            (
                Query(max_by("replica", "ray_expertmesh_uncovered_pairs", ROUTERS), "{{replica}} uncovered"),
                Query(rate_by("replica", "ray_expertmesh_no_slot_pairs_total", ROUTERS), "{{replica}} without a slot"),
            ),
            warn=1,
        ),
        Panel(
            "Weights at hand for the fallback",
            "Memory that each router keeps for experts that no shard has.",
            "bytes",
            (Query(max_by("replica", "ray_expertmesh_fallback_cached_bytes", ROUTERS), "{{replica}}"),),
        ),
    ),
)

MESH = Dashboard(
    "mesh",
    "expertmesh: mesh",
    "Between routers and shards: stages of a layer, placement, faults, migration, autopilot.",
    (NAMESPACE, APPLICATION, ROUTER),
    (GLANCE, STAGES, PLACEMENT, FAULTS, MIGRATION, AUTOPILOT),
)
