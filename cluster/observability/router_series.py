"""Series of a router: what its dispatches count, and what it knows of its shards."""

from __future__ import annotations

from collections.abc import Callable

from cluster.observability.series import Samples, Series, counter, gauge
from experts.protocol.status import RouterStatus


def _by_rank(name: str, values: Callable[[RouterStatus], list[int]], description: str) -> Series[RouterStatus]:
    def samples(status: RouterStatus) -> Samples:
        return {(str(rank),): value for rank, value in enumerate(values(status))}

    return Series(name, "counter", description, samples, ("rank",))


def _stage_seconds(status: RouterStatus) -> Samples:
    return {(stage,): histogram.sum / 1e6 for stage, histogram in vars(status.stage_us).items()}


def _stages_within(status: RouterStatus) -> Samples:
    """Cumulated buckets with upper bounds in seconds, as a histogram's."""
    found: dict[tuple[str, ...], float] = {}
    for stage, histogram in vars(status.stage_us).items():
        bounds = [str(bound / 1e6) for bound in histogram.bounds] + ["+Inf"]
        total = 0
        for bound, count in zip(bounds, histogram.buckets, strict=True):
            total += count
            found[stage, bound] = float(total)
    return found


def _connected(status: RouterStatus) -> Samples:
    return {(str(rank),): float(rank in status.connected) for rank in range(status.num_ranks)}


def _prompts(status: RouterStatus) -> Samples:
    if status.pool != "decode":
        return {}
    return {("prefill",): float(status.prompts_handed_over), ("decode",): float(status.prompts_given_up)}


ROUTER_SERIES: tuple[Series[RouterStatus], ...] = (
    counter("steps", lambda s: s.steps, "Engine steps that dispatched rows"),
    counter("dispatches", lambda s: s.dispatches, "MoE layers dispatched to shards"),
    counter("rows", lambda s: s.rows, "Token rows that went through dispatched layers"),
    counter(
        "visits",
        lambda s: s.fan_out_sum,
        "Shards visited, summed over rows and layers; divided by rows: the mean fan-out",
    ),
    counter("failovers", lambda s: s.failovers, "Dispatches that repeated rows elsewhere"),
    counter(
        "fallback_pairs",
        lambda s: s.fallback_pairs,
        "Row-expert pairs the router computed because no shard had the expert",
    ),
    counter("no_slot_pairs", lambda s: s.no_slot_pairs, "Experts of a shard given up for an epoch: it had no slot"),
    counter(
        "fallback_seconds",
        lambda s: s.fallback_ms / 1e3,
        "Time spent on computing what no shard had, and on waiting for its weights",
    ),
    counter(
        "refused_requests", lambda s: s.refused_requests, "Requests ended because no shard had an expert they need"
    ),
    Series(
        "prompts",
        "counter",
        "Prompts of a decode router that a prefill router computed (by: prefill), or it did for want of one (by: "
        "decode); short ones, and all where there are no pools, are not counted",
        _prompts,
        ("by",),
    ),
    counter("sent_bytes", lambda s: s.bytes_sent, "Bytes sent to shards"),
    counter("received_bytes", lambda s: s.bytes_received, "Bytes received from shards"),
    _by_rank("sent_rows", lambda s: s.shard_rows, "Token rows sent to the shard"),
    _by_rank("sent_pairs", lambda s: s.shard_pairs, "Row-expert pairs sent to the shard"),
    Series(
        "dispatch_stage_seconds",
        "counter",
        "Router's time in MoE layers by stage: plan_pack, wait, combine",
        _stage_seconds,
        ("stage",),
    ),
    Series(
        "dispatch_stages_within",
        "counter",
        "MoE layers whose stage took at most `le` seconds: buckets for histogram_quantile, +Inf counts all",
        _stages_within,
        ("stage", "le"),
    ),
    gauge("epoch", lambda s: s.epoch, "Epoch of the placement that the router dispatches by"),
    gauge("uncovered_pairs", lambda s: s.uncovered_pairs, "Experts of a layer that no shard of the router has now"),
    gauge("fallback_cached_bytes", lambda s: s.fallback_cached_bytes, "Bytes of weights at hand for the fallback"),
    gauge("swap_max_seconds", lambda s: s.swap_max_us / 1e6, "Longest stop of the steps for a new epoch"),
    gauge("balancedness", lambda s: s.balancedness, "Mean over max of the shards' load in row-expert pairs"),
    gauge("requests_unfinished", lambda s: s.unfinished_requests, "Requests in the engine"),
    gauge("router_resident_bytes", lambda s: s.resident_bytes, "Anonymous memory of the engine's workers"),
    Series("shard_connected", "gauge", "1 if the router has the shard", _connected, ("rank",)),
)
