"""Counters of routers and shards as Prometheus series: through Ray's metrics agent and as plain text.

Few series: labels are the router, the shard's rank and the stage of a dispatch, never an expert or a layer. What the
controller knows is in `controller_metrics`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from ray.util import metrics as ray_metrics

from cluster.mesh.messages import ControllerStatus
from cluster.observability.controller_metrics import controller_families
from cluster.observability.key_metrics import KeysView, key_families
from experts.protocol.status import RouterStatus, StageHistogram

PREFIX = "expertmesh_"
V = TypeVar("V")


@dataclass(frozen=True)
class Series(Generic[V]):
    """One series by router, or by router and rank if its value is a list."""

    name: str  # without prefix
    value: Callable[[RouterStatus], V]
    description: str


ROUTER_COUNTERS: tuple[Series[float], ...] = (
    Series("steps", lambda s: s.steps, "Engine steps that dispatched rows"),
    Series("dispatches", lambda s: s.dispatches, "MoE layers dispatched to shards"),
    Series("rows", lambda s: s.rows, "Token rows that went through dispatched layers"),
    Series(
        "visits",
        lambda s: s.fan_out_sum,
        "Shards visited, summed over rows and layers; divided by rows: the mean fan-out",
    ),
    Series("failovers", lambda s: s.failovers, "Dispatches that repeated rows elsewhere"),
    Series(
        "fallback_pairs",
        lambda s: s.fallback_pairs,
        "Row-expert pairs the router computed because no shard had the expert",
    ),
    Series("no_slot_pairs", lambda s: s.no_slot_pairs, "Experts of a shard given up for an epoch: it had no slot"),
    Series(
        "fallback_seconds",
        lambda s: s.fallback_ms / 1e3,
        "Time spent on computing what no shard had, and on waiting for its weights",
    ),
    Series("refused_requests", lambda s: s.refused_requests, "Requests ended because no shard had an expert they need"),
    Series("sent_bytes", lambda s: s.bytes_sent, "Bytes sent to shards"),
    Series("received_bytes", lambda s: s.bytes_received, "Bytes received from shards"),
)
ROUTER_GAUGES: tuple[Series[float], ...] = (
    Series("epoch", lambda s: s.epoch, "Epoch of the placement that the router dispatches by"),
    Series("uncovered_pairs", lambda s: s.uncovered_pairs, "Experts of a layer that no shard of the router has now"),
    Series("fallback_cached_bytes", lambda s: s.fallback_cached_bytes, "Bytes of weights at hand for the fallback"),
    Series("swap_max_seconds", lambda s: s.swap_max_us / 1e6, "Longest stop of the steps for a new epoch"),
    Series("balancedness", lambda s: s.balancedness, "Mean over max of the shards' load in row-expert pairs"),
)
SHARD_COUNTERS: tuple[Series[list[int]], ...] = (
    Series("shard_rows", lambda s: s.shard_rows, "Token rows that the shard computed"),
    Series("shard_pairs", lambda s: s.shard_pairs, "Row-expert pairs that the shard computed"),
)


def render(routers: Iterable[RouterStatus], controller: ControllerStatus | None, keys: KeysView | None = None) -> bytes:
    """Prometheus text of all routers, of the controller (None if it does not answer) and of keys, if there are any."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(list(routers), controller, keys))  # type: ignore[arg-type]
    return generate_latest(registry)


class _Snapshot:
    def __init__(self, routers: list[RouterStatus], controller: ControllerStatus | None, keys: KeysView | None) -> None:
        self._routers, self._controller, self._keys = routers, controller, keys

    def collect(self) -> Iterator[Any]:
        yield from router_families(self._routers)
        up = GaugeMetricFamily(PREFIX + "controller_up", "1 if the placement controller answers")
        up.add_metric([], float(self._controller is not None))
        yield up
        if self._controller is not None:
            yield from controller_families(PREFIX, self._controller)
        if self._keys is not None:
            yield from key_families(PREFIX, self._keys)


def router_families(routers: Sequence[RouterStatus]) -> Iterator[Any]:
    """Every family of routers, with or without samples."""
    tables: tuple[tuple[type, tuple[Series[float], ...]], ...] = (
        (CounterMetricFamily, ROUTER_COUNTERS),
        (GaugeMetricFamily, ROUTER_GAUGES),
    )
    for kind, table in tables:
        for series in table:
            family = kind(PREFIX + series.name, series.description, labels=["router"])
            for status in routers:
                family.add_metric([status.router_id], series.value(status))
            yield family
    for of_shards in SHARD_COUNTERS:
        family = CounterMetricFamily(PREFIX + of_shards.name, of_shards.description, labels=["router", "rank"])
        for status in routers:
            for rank, value in enumerate(of_shards.value(status)):
                family.add_metric([status.router_id, str(rank)], value)
        yield family
    connected = GaugeMetricFamily(
        PREFIX + "shard_connected", "1 if the router has the shard", labels=["router", "rank"]
    )
    pending = GaugeMetricFamily(PREFIX + "requests_unfinished", "Requests in the engine", labels=["router"])
    stages = HistogramMetricFamily(
        PREFIX + "dispatch_seconds", "Router's time in one MoE layer by stage", labels=["router", "stage"]
    )
    for status in routers:
        for rank in range(status.num_ranks):
            connected.add_metric([status.router_id, str(rank)], float(rank in status.connected))
        pending.add_metric([status.router_id], status.unfinished_requests)
        for stage, histogram in vars(status.stage_us).items():
            stages.add_metric([status.router_id, stage], *_buckets(histogram))
    yield from (connected, pending, stages)


def _buckets(histogram: StageHistogram) -> tuple[list[tuple[str, float]], float]:
    """Cumulated buckets with upper bounds in seconds, and the sum in seconds."""
    bounds = [str(bound / 1e6) for bound in histogram.bounds] + ["+Inf"]
    total, cumulated = 0, []
    for bound, count in zip(bounds, histogram.buckets, strict=True):
        total += count
        cumulated.append((bound, float(total)))
    return cumulated, histogram.sum / 1e6


class RouterMetrics:
    """The same counters through Ray's metrics agent, for clusters whose Prometheus scrapes Ray."""

    def __init__(self, router_id: str) -> None:
        self._exported: dict[tuple[str, ...], float] = {}  # totals so far, by series and tags
        self._tags = {"router": router_id}
        self._counters = [
            (series, ray_metrics.Counter(PREFIX + series.name, series.description, tag_keys=("router",)))
            for series in ROUTER_COUNTERS
        ]
        self._shard_counters = [
            (series, ray_metrics.Counter(PREFIX + series.name, series.description, tag_keys=("router", "rank")))
            for series in SHARD_COUNTERS
        ]
        self._gauges = [
            (series, ray_metrics.Gauge(PREFIX + series.name, series.description, tag_keys=("router",)))
            for series in ROUTER_GAUGES
        ]
        stage_tags = ("router", "stage")
        self._stage_sum = ray_metrics.Counter(PREFIX + "dispatch_stage_seconds", "Time in a stage", tag_keys=stage_tags)
        self._stage_count = ray_metrics.Counter(
            PREFIX + "dispatch_stage_count", "Passes of a stage", tag_keys=stage_tags
        )

    def export(self, status: RouterStatus) -> None:
        """Hand over what was counted since the last call: Ray's counters take growth, not totals."""
        for series, counter in self._counters:
            self._add(counter, series.name, series.value(status), self._tags)
        for shard_series, counter in self._shard_counters:
            for rank, value in enumerate(shard_series.value(status)):
                self._add(counter, shard_series.name, value, {**self._tags, "rank": str(rank)})
        for gauge_series, gauge in self._gauges:
            gauge.set(gauge_series.value(status), tags=self._tags)
        for stage, histogram in vars(status.stage_us).items():
            tags = {**self._tags, "stage": stage}
            self._add(self._stage_sum, "stage_sum", histogram.sum / 1e6, tags)
            self._add(self._stage_count, "stage_count", histogram.count, tags)

    def _add(self, counter: Any, name: str, total: float, tags: dict[str, str]) -> None:
        place = (name, *tags.values())
        growth = total - self._exported.get(place, 0.0)
        if growth > 0:
            counter.inc(growth, tags=tags)
            self._exported[place] = total
