"""Rows of the mesh's dashboard about experts that move, and about who decides it."""

from __future__ import annotations

from cluster.observability.dashboards.model import Panel, Query, Row
from cluster.observability.dashboards.queries import OURS, RATE, max_by, rate_by

OFF = "the autopilot is off, or has not judged a window"
NOTHING_PLANNED = "nothing was planned yet"

MIGRATION = Row(
    "Migration",
    (
        Panel(
            "Copies to make",
            "Of the present plan. If they stay the same for ten minutes, the alert MigrationStuck fires.",
            "short",
            (
                Query(max_by("application", "ray_expertmesh_migration_copies_left", OURS), "left"),
                Query(max_by("application", "ray_expertmesh_migration_copies_in_flight", OURS), "in flight"),
            ),
        ),
        Panel(
            "Bytes to copy",
            "What those copies are together.",
            "bytes",
            (Query(max_by("application", "ray_expertmesh_migration_left_bytes", OURS), "left"),),
        ),
        Panel(
            "Copied",
            "Bytes a second, between shards or from the checkpoint.",
            "Bps",
            (Query(rate_by("application", "ray_expertmesh_migration_copied_bytes_total", OURS), "copied"),),
        ),
        Panel(
            "Copies done and failed",
            "In ten minutes; with rounds, each of which is one epoch.",
            "short",
            (
                Query(f"sum(increase(ray_expertmesh_migration_copies_total{OURS}[10m]))", "done"),
                Query(f"sum(increase(ray_expertmesh_migration_failed_copies_total{OURS}[10m]))", "failed"),
                Query(f"sum(increase(ray_expertmesh_migration_rounds_total{OURS}[10m]))", "rounds"),
            ),
        ),
        Panel(
            "Target",
            "Version of the placement to reach: it grows with every plan and command.",
            "none",
            (Query(max_by("application", "ray_expertmesh_placement_target_version", OURS), "version"),),
        ),
        Panel(
            "Paused",
            "1: someone said that nothing is to move.",
            "short",
            (Query(f"max(ray_expertmesh_migration_paused{OURS})", "paused"),),
            "stat",
            warn=1,
        ),
    ),
)

AUTOPILOT = Row(
    "Autopilot",
    (
        Panel(
            "Drift",
            "What steps cost beyond the traffic that was planned for. Over 10 % for half an hour: DriftNotFollowed.",
            "percentunit",
            (Query(max_by("application", "ray_expertmesh_autopilot_drift", OURS), "drift"),),
            warn=0.1,
            may_be_empty=OFF,
        ),
        Panel(
            "Fan-out and balancedness of windows",
            "As the last window of traffic had them, over all routers.",
            "short",
            (
                Query(max_by("application", "ray_expertmesh_autopilot_fan_out", OURS), "fan-out"),
                Query(max_by("application", "ray_expertmesh_autopilot_balancedness", OURS), "balancedness"),
            ),
            may_be_empty=OFF,
        ),
        Panel(
            "Gain of the last plan",
            "Predicted, and measured after it was carried out, as a share of a step's cost.",
            "percentunit",
            (
                Query(max_by("application", "ray_expertmesh_autopilot_predicted_gain", OURS), "predicted"),
                Query(max_by("application", "ray_expertmesh_autopilot_measured_gain", OURS), "measured"),
            ),
            may_be_empty=NOTHING_PLANNED,
        ),
        Panel(
            "Plans",
            "Made, carried out, undone and failed in an hour.",
            "short",
            tuple(
                Query(f"sum(increase(ray_expertmesh_autopilot_{name}_total{OURS}[1h]))", name)
                for name in ("plans", "moves", "undone", "failures")
            ),
        ),
        Panel(
            "Traffic observed",
            "Tokens a second that routers counted for it.",
            "short",
            (Query(f"sum(rate(ray_expertmesh_autopilot_observed_tokens_total{OURS}{RATE}))", "tokens/s"),),
        ),
        Panel(
            "Frozen",
            "1: the autopilot may not move experts now, such as while a shard starts.",
            "short",
            (Query(f"max(ray_expertmesh_autopilot_frozen{OURS})", "frozen"),),
            "stat",
            warn=1,
        ),
        Panel(
            "Drifting windows",
            "Windows running whose drift is beyond noise.",
            "short",
            (Query(f"max(ray_expertmesh_autopilot_drifting_windows{OURS})", "windows"),),
            "stat",
        ),
    ),
)
