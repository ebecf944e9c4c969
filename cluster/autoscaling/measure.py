"""Statistics for Serve's autoscaler: growth of counters over the time between two looks, as plain numbers.

The keys are what `policies` reads. Serve takes the mean of its window (`look_back_period_s`) over what is measured.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.autoscaling.pulse import Pulse, TimeCounts
from cluster.autoscaling.told import Pace, ScalingFacts
from experts.protocol.status import RouterStatus, ShardStatus

SHORTEST_S = 0.5  # between two looks, for a rate that means something; earlier ones repeat the last answer
REQUESTS_SHARE = 0.8  # of the engine's max_num_seqs, where no number of requests is configured


@dataclass
class Rates:
    """Growth a second of named totals between two looks."""

    _totals: dict[str, float] = field(default_factory=dict)
    _at_s: float | None = None
    _rates: dict[str, float] = field(default_factory=dict)

    def of(self, totals: Mapping[str, float], now_s: float) -> dict[str, float]:
        """Rates since the last look; 0 at the first one. A total that shrank began anew: its rate is 0."""
        if self._at_s is not None and now_s - self._at_s < SHORTEST_S:
            return self._rates
        before, past_s = self._totals, now_s - (self._at_s if self._at_s is not None else now_s)
        self._rates = {
            name: max(total - before.get(name, total), 0.0) / past_s if past_s > 0 else 0.0
            for name, total in totals.items()
        }
        self._totals, self._at_s = dict(totals), now_s
        return self._rates


class ShardMeasure:
    """Statistics of one shard."""

    def __init__(self) -> None:
        self._rates = Rates()

    def stats(self, status: ShardStatus, facts: ScalingFacts | None, now_s: float, told_s: float) -> dict[str, float]:
        """`now_s` on a monotonic clock, `told_s` when the facts came, on one that shards share.

        `busy` is the share of the time that the shard computes, `layer_ms` the mean time of an answer.
        """
        totals = {
            "busy": status.compute_ns / 1e9,
            "rows_per_s": status.rows,
            "pairs_per_s": status.pairs,
            "answers_per_s": status.requests,
        }
        rates = self._rates.of({name: float(total) for name, total in totals.items()}, now_s)
        answers = rates["answers_per_s"]
        own = {
            **rates,
            "layer_ms": rates["busy"] * 1e3 / answers if answers else 0.0,
            "slots_used": float(status.loaded_experts),
            "slots_free": float(status.free_slots),
            "loaded_bytes": float(status.loaded_bytes),
            "empty": float(status.loaded_experts == 0),
        }
        if facts is None:
            return own
        settings = facts.settings
        return {
            **own,
            "told_s": told_s,
            "slo_ms": settings.slo.time_per_output_token_ms or 0.0,
            "utilization": settings.shards.utilization,
            "spare": float(settings.shards.spare),
            "experts": float(facts.experts),
            "copies": float(facts.copies),
            "usable_slots": float(max(status.num_slots - facts.spare_slots, 1)),
            "moving": float(facts.moving),
            "routers": float(facts.routers),
            "steps_per_s": facts.pace.steps_per_s,
            "step_ms": facts.pace.step_ms,
            "wait_ms": facts.pace.wait_ms,
        }


class EngineMeasure:
    """Statistics of one router. vLLM calls `record` after each step, on the event loop; others may read meanwhile."""

    def __init__(self) -> None:
        self.max_requests = 0
        """That the engine runs at once."""
        self._lock = threading.Lock()
        self._totals = dict.fromkeys(("tokens", "token_s", "first_tokens", "first_token_s", "finished", "queue_s"), 0.0)
        self._now = {"running": 0.0, "waiting": 0.0, "kv_cache": 0.0}
        self._for_serve, self._for_controller = Rates(), Rates()
        self._between, self._first = TimeCounts(), TimeCounts()
        self._counted = False

    def record(self, running: int, waiting: int, kv_cache: float) -> None:
        """What the scheduler has in hand. `kv_cache`: the share in use."""
        with self._lock:
            self._counted = True
            self._now = {"running": float(running), "waiting": float(waiting), "kv_cache": kv_cache}

    def add(self, *, between_s: list[float], first_s: list[float], queue_s: list[float]) -> None:
        """What a step brought: seconds between tokens, seconds to first tokens, in the queue of those that end."""
        grown = (len(between_s), sum(between_s), len(first_s), sum(first_s), len(queue_s), sum(queue_s))
        with self._lock:
            for name, growth in zip(self._totals, grown, strict=True):
                self._totals[name] += growth
            self._between.add(between_s)
            self._first.add(first_s)

    def pulse(self) -> Pulse:
        """All of it since the engine started."""
        with self._lock:
            return Pulse(
                counted=self._counted,
                tokens=int(self._totals["tokens"] + self._totals["first_tokens"]),
                running=int(self._now["running"]),
                waiting=int(self._now["waiting"]),
                kv_cache=self._now["kv_cache"],
                between=self._between.counts,
                first=self._first.counts,
            )

    def pace(self, status: RouterStatus, now_s: float) -> Pace:
        """What the controller is told."""
        with self._lock:
            totals = dict(self._totals)
        totals.update(steps=float(status.steps), wait_ms=status.stage_us.wait.sum / 1e3)
        rates = self._for_controller.of(totals, now_s)
        steps, tokens = rates["steps"], rates["tokens"]
        return Pace(
            steps_per_s=steps,
            step_ms=rates["token_s"] * 1e3 / tokens if tokens else 0.0,
            wait_ms=rates["wait_ms"] / steps if steps else 0.0,
        )

    def stats(self, facts: ScalingFacts | None, now_s: float, told_s: float) -> dict[str, float]:
        """What Serve is told; clocks as in `ShardMeasure.stats`."""
        with self._lock:
            totals, now = dict(self._totals), dict(self._now)
        rates = self._for_serve.of(totals, now_s)
        first, finished, tokens = rates["first_tokens"], rates["finished"], rates["tokens"]
        own = {
            **now,
            "tokens_per_s": tokens + first,
            "token_ms": rates["token_s"] * 1e3 / tokens if tokens else 0.0,
            "first_tokens_per_s": first,
            "first_token_ms": rates["first_token_s"] * 1e3 / first if first else 0.0,
            "queue_ms": rates["queue_s"] * 1e3 / finished if finished else 0.0,
        }
        if facts is None:
            return own
        settings = facts.settings
        return {
            **own,
            "told_s": told_s,
            "slo_ms": settings.slo.time_to_first_token_ms or 0.0,
            "requests_each": settings.routers.requests or REQUESTS_SHARE * self.max_requests,
            "kv_cache_each": settings.routers.kv_cache,
        }
