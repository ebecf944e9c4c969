"""Counters of routers and shards as Prometheus series: through Ray's metrics agent and as plain text.

Few series: labels are the router, the shard's rank and the stage of a dispatch, never an expert or a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from ray.util import metrics as ray_metrics

# name (without prefix), key in the router's status, description
ROUTER_COUNTERS = (
    ("steps", "steps", "Engine steps that dispatched rows"),
    ("dispatches", "dispatches", "MoE layers dispatched to shards"),
    ("rows", "rows", "Token rows that went through dispatched layers"),
    ("fan_out_sum", "fan_out_sum", "Shards visited, summed over rows and layers; over rows it is the mean fan-out"),
    ("failovers", "failovers", "Dispatches of which a shard's rows were repeated elsewhere"),
    ("fallback_pairs", "fallback_pairs", "Pairs of row and expert computed on the router for want of a shard"),
    ("bytes_sent", "bytes_sent", "Bytes sent to shards"),
    ("bytes_received", "bytes_received", "Bytes received from shards"),
)
ROUTER_GAUGES = (
    ("epoch", "epoch", "Epoch of the placement that the router dispatches by"),
    ("balancedness", "balancedness", "Mean over max of the shards' load in pairs of row and expert"),
)
SHARD_COUNTERS = (
    ("shard_rows", "shard_rows", "Token rows that the shard computed"),
    ("shard_pairs", "shard_pairs", "Pairs of row and expert computed by the shard"),
)
PREFIX = "expertmesh_"


def render(routers: Iterable[dict[str, Any]], controller: dict[str, Any] | None) -> bytes:
    """Prometheus text of the statuses of all routers and of the controller (None where it does not answer)."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(list(routers), controller))  # type: ignore[arg-type]
    return generate_latest(registry)


class _Snapshot:
    def __init__(self, routers: list[dict[str, Any]], controller: dict[str, Any] | None) -> None:
        self._routers, self._controller = routers, controller

    def collect(self) -> Iterator[Any]:
        for kind, table in ((CounterMetricFamily, ROUTER_COUNTERS), (GaugeMetricFamily, ROUTER_GAUGES)):
            for name, key, description in table:
                family = kind(PREFIX + name, description, labels=["router"])
                for status in self._routers:
                    family.add_metric([status["router_id"]], status[key])
                yield family
        for name, key, description in SHARD_COUNTERS:
            family = CounterMetricFamily(PREFIX + name, description, labels=["router", "rank"])
            for status in self._routers:
                for rank, value in enumerate(status[key]):
                    family.add_metric([status["router_id"], str(rank)], value)
            yield family
        connected = GaugeMetricFamily(
            PREFIX + "shard_connected", "1 if the router has the shard", labels=["router", "rank"]
        )
        pending = GaugeMetricFamily(PREFIX + "requests_unfinished", "Requests in the engine", labels=["router"])
        stages = HistogramMetricFamily(
            PREFIX + "dispatch_seconds", "Router's time in one MoE layer by stage", labels=["router", "stage"]
        )
        for status in self._routers:
            router = status["router_id"]
            for rank in range(status["num_ranks"]):
                connected.add_metric([router, str(rank)], float(rank in status["connected"]))
            pending.add_metric([router], status["unfinished_requests"])
            for stage, histogram in status["stage_us"].items():
                stages.add_metric([router, stage], *_buckets(histogram))
        yield from (connected, pending, stages)
        yield from self._controller_families()

    def _controller_families(self) -> Iterator[Any]:
        up = GaugeMetricFamily(PREFIX + "controller_up", "1 if the placement controller answers")
        up.add_metric([], float(self._controller is not None))
        yield up
        if self._controller is None:
            return
        epoch = GaugeMetricFamily(PREFIX + "controller_epoch", "Epoch that the placement controller gives out")
        epoch.add_metric([], self._controller["epoch"])
        missing = GaugeMetricFamily(PREFIX + "ranks_missing", "Ranks at which no shard serves")
        missing.add_metric([], len(self._controller["missing_ranks"]))
        loaded = GaugeMetricFamily(
            PREFIX + "shard_loaded_bytes", "Bytes of expert weights on the shard", labels=["rank"]
        )
        requests = CounterMetricFamily(PREFIX + "shard_requests", "Dispatches that the shard answered", labels=["rank"])
        for shard in self._controller["shards"]:
            if "loaded_bytes" in shard:
                loaded.add_metric([str(shard["rank"])], shard["loaded_bytes"])
                requests.add_metric([str(shard["rank"])], shard["requests"])
        yield from (epoch, missing, loaded, requests)


def _buckets(histogram: dict[str, Any]) -> tuple[list[tuple[str, float]], float]:
    """Cumulated buckets with bounds in seconds, and the sum in seconds."""
    bounds = [str(bound / 1e6) for bound in histogram["bounds"]] + ["+Inf"]
    total, cumulated = 0, []
    for bound, count in zip(bounds, histogram["buckets"], strict=True):
        total += count
        cumulated.append((bound, float(total)))
    return cumulated, histogram["sum"] / 1e6


class RouterMetrics:
    """The same counters through Ray's metrics agent, for clusters whose Prometheus scrapes Ray."""

    def __init__(self, router_id: str) -> None:
        self._seen: dict[tuple[str, str], float] = {}
        self._tags = {"router": router_id}
        self._counters = {
            key: ray_metrics.Counter(PREFIX + name, description, tag_keys=("router",))
            for name, key, description in ROUTER_COUNTERS
        }
        self._shard_counters = {
            key: ray_metrics.Counter(PREFIX + name, description, tag_keys=("router", "rank"))
            for name, key, description in SHARD_COUNTERS
        }
        self._gauges = {
            key: ray_metrics.Gauge(PREFIX + name, description, tag_keys=("router",))
            for name, key, description in ROUTER_GAUGES
        }
        stage_tags = ("router", "stage")
        self._stage_sum = ray_metrics.Counter(PREFIX + "dispatch_stage_seconds", "Time in a stage", tag_keys=stage_tags)
        self._stage_count = ray_metrics.Counter(
            PREFIX + "dispatch_stage_count", "Passes of a stage", tag_keys=stage_tags
        )

    def export(self, status: dict[str, Any]) -> None:
        """Hand over what was counted since the last call."""
        for key, counter in self._counters.items():
            self._add(counter, key, status[key], self._tags)
        for key, counter in self._shard_counters.items():
            for rank, value in enumerate(status[key]):
                self._add(counter, key, value, {**self._tags, "rank": str(rank)})
        for key, gauge in self._gauges.items():
            gauge.set(status[key], tags=self._tags)
        for stage, histogram in status["stage_us"].items():
            tags = {**self._tags, "stage": stage}
            self._add(self._stage_sum, "sum", histogram["sum"] / 1e6, tags)
            self._add(self._stage_count, "count", histogram["count"], tags)

    def _add(self, counter: Any, key: str, value: float, tags: dict[str, str]) -> None:
        place = (key, "|".join(tags.values()))
        grown = value - self._seen.get(place, 0.0)
        if grown > 0:
            counter.inc(grown, tags=tags)
            self._seen[place] = value
