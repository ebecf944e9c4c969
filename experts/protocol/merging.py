"""One answer of a router from those of its workers, of which a tensor-parallel engine has several.

The workers have the same rows and epochs, and links of their own. So what counts steps is the first one's, what counts
messages is added up, and something is done once all have done it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from experts.protocol.membership import AppliedMembership, Preparation
from experts.protocol.status import RouterStatus, StageHistogram, StageHistograms


def merged_preparation(answers: list[Preparation]) -> Preparation:
    """Ready once all workers are. The epoch is the oldest that a worker prepares."""
    if len(answers) == 1:
        return answers[0]
    epochs = {answer.epoch for answer in answers}
    return Preparation(
        epoch=min(epochs),
        ready=len(epochs) == 1 and all(answer.ready for answer in answers),
        connecting=_all_of(answer.connecting for answer in answers),
        needs_whole=any(answer.needs_whole for answer in answers),
        error="; ".join(f"worker {worker}: {answer.error}" for worker, answer in enumerate(answers) if answer.error),
    )


def merged_applied(answers: list[AppliedMembership]) -> AppliedMembership:
    """A shard is connected if all workers have a link to it, and refuses the router if it refuses any."""
    if len(answers) == 1:
        return answers[0]
    lost = _lost(answer.lost for answer in answers)
    return AppliedMembership(
        epoch=min(answer.epoch for answer in answers),
        connected=[rank for rank in answers[0].connected if rank not in lost],
        lost=lost,
        refused=_all_of(answer.refused for answer in answers),
    )


def merged_status(answers: list[RouterStatus]) -> RouterStatus:
    """Steps, rows and what only the first worker knows are its own; messages, bytes and memory are those of all."""
    first = answers[0]
    if len(answers) == 1:
        return first
    lost = _lost(answer.lost for answer in answers)
    pairs = _by_rank(answer.shard_pairs for answer in answers)
    ages_s = [answer.last_success_age_s for answer in answers if answer.last_success_age_s is not None]
    return replace(
        first,
        epoch=min(answer.epoch for answer in answers),
        connected=[rank for rank in first.connected if rank not in lost],
        transports={rank: name for rank, name in first.transports.items() if rank not in lost},
        lost=lost,
        fan_out_sum=sum(answer.fan_out_sum for answer in answers),
        failovers=sum(answer.failovers for answer in answers),
        fallback_pairs=sum(answer.fallback_pairs for answer in answers),
        bytes_sent=sum(answer.bytes_sent for answer in answers),
        bytes_received=sum(answer.bytes_received for answer in answers),
        balancedness=sum(pairs) / len(pairs) / max(pairs) if any(pairs) else 1.0,
        shard_rows=_by_rank(answer.shard_rows for answer in answers),
        shard_pairs=pairs,
        last_success_age_s=min(ages_s, default=None),
        stage_us=StageHistograms(
            plan_pack=_added(answer.stage_us.plan_pack for answer in answers),
            wait=_added(answer.stage_us.wait for answer in answers),
            combine=_added(answer.stage_us.combine for answer in answers),
        ),
        no_slot_pairs=sum(answer.no_slot_pairs for answer in answers),
        uncovered_pairs=max(answer.uncovered_pairs for answer in answers),
        fallback_ms=sum(answer.fallback_ms for answer in answers),
        fallback_cached_bytes=sum(answer.fallback_cached_bytes for answer in answers),
        refused_requests=sum(answer.refused_requests for answer in answers),
        swap_last_us=max(answer.swap_last_us for answer in answers),
        swap_max_us=max(answer.swap_max_us for answer in answers),
        params=sum(answer.params for answer in answers),
        resident_bytes=sum(answer.resident_bytes for answer in answers),
        workers=len(answers),
    )


def _all_of(ranks: Iterable[list[int]]) -> list[int]:
    return sorted({rank for some in ranks for rank in some})


def _lost(of_workers: Iterable[dict[int, str]]) -> dict[int, str]:
    """Why a worker has no link, by rank; the first one's reason if several lack it."""
    lost: dict[int, str] = {}
    for worker, reasons in enumerate(of_workers):
        for rank, reason in reasons.items():
            lost.setdefault(rank, f"worker {worker}: {reason}" if worker else reason)
    return dict(sorted(lost.items()))


def _by_rank(counts: Iterable[list[int]]) -> list[int]:
    """Sums rank by rank. Workers have as many ranks, but for the moment between two epochs."""
    lists = list(counts)
    longest = max(map(len, lists))
    return [sum(column) for column in zip(*(one + [0] * (longest - len(one)) for one in lists), strict=True)]


def _added(histograms: Iterable[StageHistogram]) -> StageHistogram:
    several = list(histograms)
    return StageHistogram(
        sum=sum(one.sum for one in several),
        count=sum(one.count for one in several),
        buckets=[sum(column) for column in zip(*(one.buckets for one in several), strict=True)],
        bounds=several[0].bounds,
    )
