"""From looks at a service to what is told of it: whether it is well, and rates from differences of counters. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cluster.status_command.look import Look


def report(url: str, now: Look, before: Look | None = None) -> dict[str, Any]:
    """The status as plain data. Rates are None without an earlier look at the same processes."""
    found = list(problems(now))
    status = now.status or {}
    controller: dict[str, Any] = status.get("controller") or {}
    old = {router["router_id"]: router for router in ((before and before.status) or {}).get("routers", [])}
    seconds = now.at_s - before.at_s if before is not None else 0.0
    pairs = [(old.get(router["router_id"]), router) for router in status.get("routers", [])]
    routers = [_router(then, router, seconds) for then, router in pairs]
    rates = [router["tokens_per_s"] for router in routers if router["tokens_per_s"] is not None]
    return {
        "url": url,
        "healthy": not found,
        "problems": found,
        "epoch": controller.get("epoch"),
        "tokens_per_s": sum(rates) if rates else None,
        "over_s": seconds or None,
        "requests": sum(router["requests"] for router in routers),
        "routers": routers,
        "shards": [_shard(seat, pairs, seconds) for seat in controller.get("shards", [])],
        "migration": controller.get("migration"),
        "autopilot": controller.get("autopilot"),
    }


def problems(look: Look) -> Iterator[str]:
    """One line for each reason why the service is not well."""
    health = look.health
    body = health.body if isinstance(health.body, dict) else {}
    if health.code != 200 or body.get("status", "ok") != "ok":
        told = body.get("reason") or health.body
        yield f"/health: {f'status {health.code}: ' if health.code else ''}{told or 'no reason given'}"
    if look.status is None:
        yield look.lacking
        return
    yield from look.status.get("errors", [])
    routers, controller = look.status["routers"], look.status.get("controller")
    if not routers:
        yield "no router answers"
    for router in routers:
        for rank, why in router["lost"].items():
            if controller is None or _is_wanted(controller, int(rank)):
                yield f"router {router['router_id']} has no link to rank {rank}: {why}"
    if controller is not None:
        yield from _of_controller(controller)


def _is_wanted(controller: dict[str, Any], rank: int) -> bool:
    """Whether a shard should be at the rank: none is at that of one that has left for good, until another comes."""
    return rank in controller["missing_ranks"] or any(seat["rank"] == rank for seat in controller["shards"])


def _of_controller(controller: dict[str, Any]) -> Iterator[str]:
    migration = controller["migration"]
    if migration["unserved"]:
        yield f"{migration['unserved']} experts of a layer are served by no shard"
    elif not controller["complete"]:
        yield "not every expert is served"
    if controller["missing_ranks"]:
        yield f"no shard at rank {', '.join(map(str, controller['missing_ranks']))}"
    if controller["refusal"]:
        yield controller["refusal"]
    if migration["problem"]:
        yield migration["problem"]
    for seat in controller["shards"]:
        if seat.get("fault") or seat.get("alive") is False:
            yield f"the shard at rank {seat['rank']} computes nothing: {seat.get('fault') or 'its loop has ended'}"


def _router(then: dict[str, Any] | None, now: dict[str, Any], seconds: float) -> dict[str, Any]:
    rows, steps, dispatches = (_gain(then, now, counter) for counter in ("rows", "steps", "dispatches"))
    tokens = None if rows is None or steps is None or dispatches is None else rows * steps / max(dispatches, 1)
    visits = _gain(then, now, "fan_out_sum")
    return {
        "router_id": now["router_id"],
        "pool": now.get("pool", ""),
        "epoch": now["epoch"],
        "pid": now["pid"],
        "connected": now["connected"],
        "lost": now["lost"],
        "requests": now["unfinished_requests"],
        # A token is a row in each MoE layer that a step goes through, which depends on whether it guesses and how
        # often; those of prompts count, too.
        "tokens_per_s": None if tokens is None else tokens / seconds,
        "fan_out": visits / rows if rows and visits is not None else None,
        "failovers": now["failovers"],
        "fallback_pairs": now["fallback_pairs"],
        "refused_requests": now["refused_requests"],
    }


def _shard(seat: dict[str, Any], pairs: list[tuple[Any, dict[str, Any]]], seconds: float) -> dict[str, Any]:
    """`rows_per_s`: of all layers, as the routers count what they send."""
    rank, rates = seat["rank"], []
    for then, now in pairs:
        if then is not None and rank < min(len(then["shard_rows"]), len(now["shard_rows"])):
            gain = now["shard_rows"][rank] - then["shard_rows"][rank]
            if gain >= 0 and then["pid"] == now["pid"]:
                rates.append(gain / seconds)
    told = ("rank", "shard_id", "state", "num_slots", "experts_held", "experts_missing", "silent_s", "node_id", "pid")
    return {key: seat[key] for key in told} | {"rows_per_s": sum(rates) if rates else None}


def _gain(then: dict[str, Any] | None, now: dict[str, Any], counter: str) -> int | None:
    """What a counter gained; None for a process that was not there before."""
    if then is None or then["pid"] != now["pid"] or now[counter] < then[counter]:
        return None
    return int(now[counter] - then[counter])
