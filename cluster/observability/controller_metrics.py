"""What the controller knows of shards and of the migration, as Prometheus families.

Few series: one a fact of the mesh, and one a fact, shard and source of copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from cluster.autopilot.messages import AutopilotView
from cluster.mesh.messages import ControllerStatus, MigrationView, SeatView
from experts.protocol.status import ShardStatus

SOURCES = (
    "process",
    "shm",
    "tcp",
    "checkpoint",
)  # series of these are there from the start, so that rates see the first copy

T = TypeVar("T")


@dataclass(frozen=True)
class Fact(Generic[T]):
    """One series, or one for each shard."""

    name: str  # without prefix; a counter gets _total
    value: Callable[[T], float]
    description: str


MESH_GAUGES: tuple[Fact[ControllerStatus], ...] = (
    Fact("controller_epoch", lambda s: s.epoch, "Epoch that the placement controller gives out"),
    Fact("ranks_missing", lambda s: len(s.missing_ranks), "Ranks at which no shard serves"),
)
MIGRATION_GAUGES: tuple[Fact[MigrationView], ...] = (
    Fact("placement_target_version", lambda m: m.target_version, "Version of the placement to reach; 0 without one"),
    Fact("migration_paused", lambda m: float(m.paused), "1 if experts do not move because someone said so"),
    Fact("migration_copies_in_flight", lambda m: m.copies_in_flight, "Copies of experts that are ordered and not done"),
    Fact("migration_copies_left", lambda m: m.copies_left, "Copies of the present plan that are not done"),
    Fact("migration_left_bytes", lambda m: m.bytes_left, "Bytes of the copies that are left"),
    Fact("experts_sole", lambda m: m.sole_copies, "Experts of a layer that one shard alone serves"),
    Fact("experts_unserved", lambda m: m.unserved, "Experts of a layer that no shard serves"),
)
MIGRATION_COUNTERS: tuple[Fact[MigrationView], ...] = (
    Fact("migration_rounds", lambda m: m.rounds, "Rounds done since the controller started"),
    Fact("migration_copies", lambda m: m.copies, "Copies done since the controller started"),
    Fact("migration_copied_bytes", lambda m: m.copied_bytes, "Bytes of those copies"),
    Fact("migration_failed_copies", lambda m: m.failed_copies, "Copies that failed since the controller started"),
)
AUTOPILOT_GAUGES: tuple[Fact[AutopilotView], ...] = (
    Fact("autopilot_frozen", lambda a: float(bool(a.frozen)), "1 if the autopilot may not move experts for now"),
    Fact("autopilot_drifting_windows", lambda a: a.drifting, "Windows running whose drift is beyond noise"),
    Fact("autopilot_drift", lambda a: _of_window(a, "drift"), "Excess of measured over planned step cost, as a share"),
    Fact("autopilot_fan_out", lambda a: _of_window(a, "fan_out"), "Shards that a token visits in a layer, last window"),
    Fact("autopilot_balancedness", lambda a: _of_window(a, "balancedness"), "Balancedness of shards, last window"),
    Fact("autopilot_predicted_gain", lambda a: _of_last(a, "predicted_gain"), "What the last plan saves, as a share"),
    Fact("autopilot_measured_gain", lambda a: _of_last(a, "measured_gain"), "What the last plan saved once measured"),
)
AUTOPILOT_COUNTERS: tuple[Fact[AutopilotView], ...] = (
    Fact("autopilot_reports", lambda a: a.counters.reports, "Reports of routers"),
    Fact("autopilot_observed_tokens", lambda a: a.counters.tokens, "Tokens that routers counted"),
    Fact("autopilot_windows", lambda a: a.counters.windows, "Windows of traffic that were judged"),
    Fact("autopilot_plans", lambda a: a.counters.plans, "Plans that were made"),
    Fact("autopilot_moves", lambda a: a.counters.moves, "Plans that were carried out"),
    Fact("autopilot_undone", lambda a: a.counters.undone, "Plans that made things worse and were undone"),
    Fact("autopilot_failures", lambda a: a.counters.failures, "Windows and plans without a result"),
)
SEAT_GAUGES: tuple[Fact[SeatView], ...] = (
    Fact("shard_slots", lambda s: s.num_slots, "Slots of a layer; 0 while the shard starts"),
    Fact("shard_experts_held", lambda s: s.experts_held, "Experts in the shard's slots, over all layers"),
    Fact("shard_experts_missing", lambda s: s.experts_missing, "Experts that the target gives the shard and it lacks"),
)
SHARD_GAUGES: tuple[Fact[ShardStatus], ...] = (
    Fact("shard_loaded_bytes", lambda s: s.loaded_bytes, "Bytes of expert weights on the shard"),
)
SHARD_COUNTERS: tuple[Fact[ShardStatus], ...] = (
    Fact("shard_requests", lambda s: s.requests, "Dispatches that the shard answered"),
    Fact("shard_failed_copies", lambda s: s.copies_failed, "Copies into the shard that failed"),
    Fact("shard_copy_seconds", lambda s: s.copy_seconds, "Time in which copies into the shard ran"),
    Fact("shard_handed_out", lambda s: s.handed_out, "Experts that other shards copied from this one"),
    Fact("shard_handed_out_bytes", lambda s: s.handed_out_bytes, "Bytes of those experts"),
)
SHARD_SOURCES: tuple[Fact[tuple[ShardStatus, str]], ...] = (
    Fact("shard_copies", lambda at: at[0].copies.get(at[1], 0), "Copies into the shard by source"),
    Fact("shard_copied_bytes", lambda at: at[0].copied_bytes.get(at[1], 0), "Bytes of copies into the shard by source"),
)


def controller_families(prefix: str, status: ControllerStatus) -> Iterator[Any]:
    """Every family, with or without samples."""
    yield from _families(GaugeMetricFamily, prefix, MESH_GAUGES, [((), status)])
    yield from _families(GaugeMetricFamily, prefix, MIGRATION_GAUGES, [((), status.migration)])
    yield from _families(CounterMetricFamily, prefix, MIGRATION_COUNTERS, [((), status.migration)])
    yield from _families(GaugeMetricFamily, prefix, AUTOPILOT_GAUGES, [((), status.autopilot)])
    yield from _families(CounterMetricFamily, prefix, AUTOPILOT_COUNTERS, [((), status.autopilot)])
    state = GaugeMetricFamily(
        prefix + "shard_state", "1 for the state that the shard is in: joining, filling, serving or draining",
        labels=["rank", "state"],
    )  # fmt: skip
    for seat in status.shards:
        state.add_metric([str(seat.rank), seat.state], 1)
    yield state
    seats = [((str(seat.rank),), seat) for seat in status.shards]
    shards = [((str(seat.rank),), seat.status) for seat in status.shards if seat.status is not None]
    yield from _families(GaugeMetricFamily, prefix, SEAT_GAUGES, seats, "rank")
    yield from _families(GaugeMetricFamily, prefix, SHARD_GAUGES, shards, "rank")
    yield from _families(CounterMetricFamily, prefix, SHARD_COUNTERS, shards, "rank")
    sources = [
        ((*labels, source), (shard, source)) for labels, shard in shards for source in sorted({*SOURCES, *shard.copies})
    ]
    yield from _families(CounterMetricFamily, prefix, SHARD_SOURCES, sources, "rank", "source")


def _of_window(view: AutopilotView, name: str) -> float:
    value = None if view.window is None else getattr(view.window, name)
    return math.nan if value is None else float(value)


def _of_last(view: AutopilotView, name: str) -> float:
    value = None if view.last is None else getattr(view.last, name)
    return math.nan if value is None else float(value)


def _families(
    kind: type, prefix: str, facts: tuple[Fact[T], ...], items: Sequence[tuple[tuple[str, ...], T]], *labels: str
) -> Iterator[Any]:
    """A family for each fact, with a sample for each of `items`: (values of the labels, what has the fact)."""
    for fact in facts:
        family = kind(prefix + fact.name, fact.description, labels=labels)
        for values, item in items:
            family.add_metric(values, fact.value(item))
        yield family
