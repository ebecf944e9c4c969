"""The policies that Serve's autoscaler calls: `shards` and `routers`, pure functions of what replicas report.

    policy: {policy_function: "cluster.autoscaling.policies:shards"} # of autoscaling_config

Serve pickles this module by value and runs it in its own controller: it imports nothing but the standard library, so
that it works, and is of this version, wherever that controller runs. Delays and bounds are Serve's
(`upscale_delay_s`, `downscale_delay_s`, `min_replicas`, `max_replicas`). Up goes as far as the load needs; down goes
one at a time, where the load would still fit if it grew by HEADROOM.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

logger = logging.getLogger("ray.serve")

HEADROOM = 1.25  # a replica goes only if the others could take this much of today's load, lest the number swing
FULL = 0.9  # share of the time that shards may compute while one of them is lost
OWN_SHARE = 0.1  # of the SLO, for shards at least, if all else takes longer than the SLO
LEAST_BALANCE = 0.5  # of shards, for what is asked of more of them: a worse one is for the placement to mend


@dataclass(frozen=True)
class ShardLoad:
    """What shards do, all together, and what they need to hold."""

    shards: int  # that have experts to compute
    busy: float  # share of the time that each computes, summed over shards
    balance: float = 1.0  # mean over max of those shares
    steps_per_s: float = 0.0  # of all routers
    routers: int = 1
    step_ms: float = 0.0  # time per output token, as users feel it; 0: nothing was generated
    wait_ms: float = 0.0  # of it, for shards
    slo_ms: float = 0.0  # what it should be at most; 0: whatever comes
    utilization: float = 0.6  # share of the time that the busiest shard should compute at most
    spare: int = 1  # shards that may be lost
    experts: int = 1  # of a layer
    copies: int = 1  # of each expert
    usable_slots: int = 1  # of a layer and shard, spare ones not counted

    def grown(self, factor: float) -> ShardLoad:
        """More of the same: each step computes that much more, and all else takes as long as now."""
        grown = replace(self, busy=self.busy * factor)
        more_ms = grown.part_ms(self.shards) - self.part_ms(self.shards)
        if self.step_ms <= 0:
            return grown
        wait_ms = self.wait_ms + more_ms if self.wait_ms > 0 else 0.0
        return replace(grown, step_ms=self.step_ms + more_ms, wait_ms=wait_ms)

    def part_ms(self, shards: int) -> float:
        """Predicted part of a step that `shards` shards take: their computing, behind that of other routers."""
        if self.steps_per_s <= 0 or shards <= 0:
            return 0.0
        share = self.busy / (shards * self.balance)
        others = min(share * (self.routers - 1) / max(self.routers, 1), 0.95)
        return share * 1e3 / self.steps_per_s / (1 - others)


def shards_needed(load: ShardLoad, most: int) -> tuple[int, str]:
    """(the fewest shards for this load, what asks for them). `most`: those above are not tried for the SLO."""
    busiest = load.busy / load.balance
    asked = {
        f"{load.copies} copies of {load.experts} experts": max(
            math.ceil(load.experts * load.copies / load.usable_slots),
            math.ceil(load.experts / load.usable_slots) + load.spare,
            load.copies,
        ),
        f"utilization up to {load.utilization:.2f}": math.ceil(round(busiest / load.utilization, 6)),
        f"the loss of {load.spare}": math.ceil(round(busiest / FULL, 6)) + load.spare,
        f"{load.slo_ms:g} ms a token": _for_slo(load, most),
    }
    why = max(asked, key=lambda reason: asked[reason])
    return asked[why], why


def _for_slo(load: ShardLoad, most: int) -> int:
    """The fewest shards whose part of a step fits into what the SLO leaves for it; `most` if none does."""
    if load.slo_ms <= 0 or load.step_ms <= 0:
        return 0
    now_ms = load.part_ms(load.shards)
    rest_ms = load.step_ms - (min(now_ms, load.wait_ms) if load.wait_ms > 0 else now_ms)
    allowed_ms = max(load.slo_ms - rest_ms, OWN_SHARE * load.slo_ms)
    return next((count for count in range(1, most) if load.part_ms(count) <= allowed_ms), most)


@dataclass(frozen=True)
class RouterLoad:
    """What routers do, all together."""

    routers: int
    requests: float  # running, waiting, and waiting for a router
    kv_cache: float = 0.0  # share in use, summed over routers
    first_token_ms: float = 0.0  # mean; 0: no request got its first token
    queue_ms: float = 0.0  # of it, before the engine took the request up
    slo_ms: float = 0.0  # what it should be at most; 0: whatever comes
    requests_each: float = 64.0  # that a router should have at most
    kv_cache_each: float = 0.8  # share that should be in use at most

    def grown(self, factor: float) -> RouterLoad:
        """More of the same."""
        queue_ms = self.queue_ms * factor
        return replace(
            self,
            requests=self.requests * factor,
            kv_cache=self.kv_cache * factor,
            queue_ms=queue_ms,
            first_token_ms=self.first_token_ms + queue_ms - self.queue_ms,
        )


def routers_needed(load: RouterLoad) -> tuple[int, str]:
    """(the fewest routers for this load, what asks for them): 0 without any request."""
    asked = {
        f"{load.requests_each:g} requests each": math.ceil(round(load.requests / load.requests_each, 6)),
        f"{load.kv_cache_each:.2f} of the KV cache": math.ceil(round(load.kv_cache / load.kv_cache_each, 6)),
        f"{load.slo_ms:g} ms to the first token": 0,
    }
    if load.slo_ms > 0 and load.queue_ms > 0:
        # Only waiting gets shorter with more routers. It is shared out; a prompt's own time stays.
        allowed_ms = max(load.slo_ms - (load.first_token_ms - load.queue_ms), OWN_SHARE * load.slo_ms)
        reason = f"{load.slo_ms:g} ms to the first token"
        asked[reason] = math.ceil(round(load.routers * load.queue_ms / allowed_ms, 6))
    why = max(asked, key=lambda reason: asked[reason])
    return (max(asked[why], 1), why) if load.requests > 0 else (0, "no request")


def decide(now: int, needed: int, needed_grown: int, settled: bool) -> int:
    """How many there should be, of `now`: up at once, down by one if a grown load fits and everything is settled."""
    if needed > now:
        return needed
    return now - 1 if settled and max(needed, needed_grown) < now else now


# What Serve calls -----------------------------------------------------------------------------------------------------


def shards(context: Any) -> tuple[int, dict[str, Any]]:
    """Policy of the deployment `ExpertShard`; `context` is Serve's AutoscalingContext."""
    state, now = dict(context.policy_state), int(context.target_num_replicas)
    seen = _by_replica(context)
    told = max((stats for stats in seen if stats.get("experts")), key=lambda stats: stats["told_s"], default=None)
    if told is None:
        return now, state  # Serve has just started to count, or no shard serves yet
    filled = [stats for stats in seen if not stats["empty"]] or seen
    settled = len(seen) == now and len(filled) == len(seen) and not told["moving"]
    busy = sum(stats["busy"] for stats in seen)
    if settled and busy > 0:
        busiest = max(stats["busy"] for stats in seen)
        state["balance"] = min(max(busy / (len(seen) * busiest), LEAST_BALANCE), 1.0)
    load = ShardLoad(
        shards=len(filled),
        busy=busy,
        balance=state.get("balance", 1.0),
        steps_per_s=told["steps_per_s"],
        routers=int(told["routers"]),
        step_ms=told["step_ms"],
        wait_ms=told["wait_ms"],
        slo_ms=told["slo_ms"],
        utilization=told["utilization"],
        spare=int(told["spare"]),
        experts=int(told["experts"]),
        copies=int(told["copies"]),
        usable_slots=max(1, int(min(stats["usable_slots"] for stats in seen))),
    )
    most = max(int(context.capacity_adjusted_max_replicas), 1)
    needed, why = shards_needed(load, most)
    wanted = _bounded(decide(now, needed, shards_needed(load.grown(HEADROOM), most)[0], settled), context)
    return wanted, _explained(state, "shards", now, wanted, f"{why}; {load}")


def routers(context: Any) -> tuple[int, dict[str, Any]]:
    """Policy of the deployment `Router`; `context` is Serve's AutoscalingContext."""
    state, now = dict(context.policy_state), int(context.target_num_replicas)
    seen = _by_replica(context)
    told = max((stats for stats in seen if stats.get("requests_each")), key=lambda stats: stats["told_s"], default=None)
    if told is None:
        return now, state
    requests = sum(stats["running"] + stats["waiting"] for stats in seen)
    first_tokens = sum(stats["first_tokens_per_s"] for stats in seen)
    load = RouterLoad(
        routers=len(seen),
        requests=requests + float(context.total_queued_requests or 0.0),
        kv_cache=sum(stats["kv_cache"] for stats in seen),
        first_token_ms=_mean(seen, "first_token_ms", first_tokens),
        queue_ms=_mean(seen, "queue_ms", first_tokens),
        slo_ms=told["slo_ms"],
        requests_each=told["requests_each"],
        kv_cache_each=told["kv_cache_each"],
    )
    needed, why = routers_needed(load)
    wanted = _bounded(decide(now, needed, routers_needed(load.grown(HEADROOM))[0], len(seen) == now), context)
    return wanted, _explained(state, "routers", now, wanted, f"{why}; {load}")


# What is told rather than measured: the newest value counts, not the mean of the window.
TOLD = frozenset(
    {
        *("told_s", "slo_ms", "utilization", "spare", "experts", "copies", "usable_slots", "moving", "empty"),
        *("routers", "requests_each", "kv_cache_each"),
    }
)


def _by_replica(context: Any) -> list[dict[str, float]]:
    """What each running replica reported: means over Serve's window of what was measured, the last of what was told."""
    found: dict[Any, dict[str, float]] = {}
    means: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
    raw: Mapping[str, Mapping[Any, Any]] = context.raw_metrics or {}
    for name, values in means.items():
        for replica, value in values.items():
            series = raw.get(name, {}).get(replica)
            found.setdefault(replica, {})[name] = series[-1].value if name in TOLD and series else value
    return [stats for stats in found.values() if "told_s" in stats]


def _bounded(count: int, context: Any) -> int:
    """Serve does that too, but the log should say what comes of it."""
    return max(int(context.capacity_adjusted_min_replicas), min(int(context.capacity_adjusted_max_replicas), count))


def _mean(seen: list[dict[str, float]], name: str, first_tokens: float) -> float:
    """Mean over requests of a time."""
    if first_tokens <= 0:
        return 0.0
    return sum(stats[name] * stats["first_tokens_per_s"] for stats in seen) / first_tokens


def _explained(state: dict[str, Any], what: str, now: int, wanted: int, why: str) -> dict[str, Any]:
    """The state with this decision in it; the log has each change once."""
    if wanted != now and state.get("wanted") != wanted:
        logger.info("%s: from %d to %d, for %s", what, now, wanted, why)
    state["wanted"] = wanted
    return state
