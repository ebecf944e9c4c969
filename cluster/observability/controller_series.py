"""Series of the placement controller: the mesh as a whole, the migration, the autopilot, and each rank's state."""

from __future__ import annotations

import time
from collections.abc import Callable

from cluster.mesh.messages import ControllerStatus, SeatView
from cluster.observability.series import Samples, Series, counter, gauge

STATES = ("joining", "filling", "serving", "draining")


def _states(status: ControllerStatus) -> Samples:
    return {(str(seat.rank), state): float(seat.state == state) for seat in status.shards for state in STATES}


def _by_rank(name: str, value: Callable[[SeatView], float], description: str) -> Series[ControllerStatus]:
    def samples(status: ControllerStatus) -> Samples:
        return {(str(seat.rank),): float(value(seat)) for seat in status.shards}

    return Series(name, "gauge", description, samples, ("rank",))


def _of_window(name: str, field: str, description: str) -> Series[ControllerStatus]:
    return gauge(name, lambda s: getattr(s.autopilot.window, field, None), description)


def _of_last(name: str, field: str, description: str) -> Series[ControllerStatus]:
    return gauge(name, lambda s: getattr(s.autopilot.last, field, None), description)


CONTROLLER_SERIES: tuple[Series[ControllerStatus], ...] = (
    gauge(
        "controller_looked_timestamp_seconds",
        lambda s: time.time(),
        "When the placement controller last looked at its shards, in seconds since 1970",
    ),
    gauge("controller_epoch", lambda s: s.epoch, "Epoch that the placement controller gives out"),
    gauge("ranks", lambda s: s.num_ranks, "Ranks of the placement"),
    gauge("ranks_missing", lambda s: len(s.missing_ranks), "Ranks at which no shard serves"),
    Series("rank_state", "gauge", "1 for the state that the rank's shard is in", _states, ("rank", "state")),
    _by_rank("rank_experts_held", lambda s: s.experts_held, "Experts that the rank's shard holds, over all layers"),
    _by_rank("rank_experts_missing", lambda s: s.experts_missing, "Experts that the rank's target has and it lacks"),
    gauge("experts_sole", lambda s: s.migration.sole_copies, "Experts of a layer that one shard alone serves"),
    gauge("experts_unserved", lambda s: s.migration.unserved, "Experts of a layer that no shard serves"),
    gauge(
        "placement_target_version",
        lambda s: s.migration.target_version,
        "Version of the placement to reach; 0 without one",
    ),
    gauge("migration_paused", lambda s: s.migration.paused, "1 if experts do not move because someone said so"),
    gauge(
        "migration_copies_in_flight",
        lambda s: s.migration.copies_in_flight,
        "Copies of experts that are ordered and not done",
    ),
    gauge("migration_copies_left", lambda s: s.migration.copies_left, "Copies of the present plan that are not done"),
    gauge("migration_left_bytes", lambda s: s.migration.bytes_left, "Bytes of the copies that are left"),
    counter("migration_rounds", lambda s: s.migration.rounds, "Rounds done since the controller started"),
    counter("migration_copies", lambda s: s.migration.copies, "Copies done since the controller started"),
    counter("migration_copied_bytes", lambda s: s.migration.copied_bytes, "Bytes of those copies"),
    counter(
        "migration_failed_copies",
        lambda s: s.migration.failed_copies,
        "Copies that failed in this life of the controller",
    ),
    gauge("autopilot_frozen", lambda s: bool(s.autopilot.frozen), "1 if the autopilot may not move experts for now"),
    gauge("autopilot_drifting_windows", lambda s: s.autopilot.drifting, "Windows running whose drift is beyond noise"),
    _of_window("autopilot_drift", "drift", "Excess of measured over planned step cost, as a share"),
    _of_window("autopilot_fan_out", "fan_out", "Shards that a token visits in a layer, last window"),
    _of_window("autopilot_balancedness", "balancedness", "Balancedness of shards, last window"),
    _of_last("autopilot_predicted_gain", "predicted_gain", "What the last plan saves, as a share"),
    _of_last("autopilot_measured_gain", "measured_gain", "What the last plan saved once measured"),
    counter("autopilot_reports", lambda s: s.autopilot.counters.reports, "Reports of routers"),
    counter("autopilot_observed_tokens", lambda s: s.autopilot.counters.tokens, "Tokens that routers counted"),
    counter("autopilot_windows", lambda s: s.autopilot.counters.windows, "Windows of traffic that were judged"),
    counter("autopilot_plans", lambda s: s.autopilot.counters.plans, "Plans that were made"),
    counter("autopilot_moves", lambda s: s.autopilot.counters.moves, "Plans that were carried out"),
    counter("autopilot_undone", lambda s: s.autopilot.counters.undone, "Plans that made things worse and were undone"),
    counter("autopilot_failures", lambda s: s.autopilot.counters.failures, "Windows and plans without a result"),
)
