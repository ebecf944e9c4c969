"""What the live page gets to show, as plain data: small, and made from what the controller and the routers said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from cluster.console.router_events import RouterEvent
from cluster.mesh.messages import ControllerStatus, PublishedView, SeatView, WatchView
from cluster.router.messages import RouterLive


def controller(status: ControllerStatus) -> dict[str, Any]:
    """The mesh as a whole."""
    return {
        "term": status.term,
        "epoch": status.epoch,
        "complete": status.complete,
        "missing_ranks": status.missing_ranks,
        "num_ranks": status.num_ranks,
        "refusal": status.refusal,
        "migration": asdict(status.migration),
        "autopilot": asdict(status.autopilot),
    }


def shards(status: ControllerStatus, pairs_R: Sequence[int]) -> list[dict[str, Any]]:
    """Each shard, and each rank without one. `pairs_R`: row-expert pairs of the last minute."""
    given_up = {
        rank: [name for name, router in status.routers.items() if rank in router.lost]
        for rank in {rank for router in status.routers.values() for rank in router.lost}
    }
    found = [_shard(seat, pairs_R, given_up.get(seat.rank, [])) for seat in status.shards]
    there = {seat.rank for seat in status.shards}
    missing = [{"rank": rank, "state": "missing"} for rank in status.missing_ranks if rank not in there]
    return sorted([*found, *missing], key=lambda shard: shard["rank"])


def _shard(seat: SeatView, pairs_R: Sequence[int], given_up: list[str]) -> dict[str, Any]:
    status = seat.status
    plain: dict[str, Any] = {
        "rank": seat.rank,
        "state": seat.state,
        "id": seat.shard_id,
        "node": seat.node_id,
        "slots": seat.num_slots,
        "held": seat.experts_held,
        "missing": seat.experts_missing,
        "silent_s": round(seat.silent_s, 1),
        "pid": seat.pid,
        "lost_by": given_up,
        "pairs": pairs_R[seat.rank] if seat.rank < len(pairs_R) else 0,
    }
    if status is None:
        return plain
    if status.fault or not status.alive:
        plain["fault"] = status.fault or "its compute loop has ended"
    return {
        **plain,
        "host": status.endpoint.host,
        "port": status.endpoint.port,
        "device": status.endpoint.device,
        "kernel": status.kernel,
        "bytes": status.loaded_bytes,
        "copying": status.copies_in_flight,
        "copies": status.copies,
        "copies_failed": status.copies_failed,
        "handed_out": status.handed_out,
        "errors": status.errors,
        "last_error": status.last_error,
        "offload": None if status.offload is None else asdict(status.offload),
    }


def routers(lives: Sequence[RouterLive], status: ControllerStatus | None) -> list[dict[str, Any]]:
    """Each router that answers, then those that the controller alone knows."""
    known = {} if status is None else status.routers
    found = [
        {
            "id": live.status.router_id,
            "answers": True,
            "pool": live.status.pool,
            "workers": live.status.workers,
            "epoch": live.status.epoch,
            "connected": len(live.status.connected),
            "num_ranks": live.status.num_ranks,
            "lost": live.status.lost,
            "transports": sorted(set(live.status.transports.values())),
            "running": live.pulse.running,
            "waiting": live.pulse.waiting,
            "kv_cache": live.pulse.kv_cache,
            "counted": live.pulse.counted,
            "uncovered": live.status.uncovered_pairs,
            "failovers": live.status.failovers,
            "fallback_pairs": live.status.fallback_pairs,
            "refused": live.status.refused_requests,
            "pid": live.status.pid,
            "swap_max_us": live.status.swap_max_us,
        }
        for live in lives
    ]
    answering = {live.status.router_id for live in lives}
    silent = [
        {"id": name, "answers": False, "epoch": router.epoch, "lost": router.lost}
        for name, router in sorted(known.items())
        if name not in answering
    ]
    return [*found, *silent]


def placement(published: PublishedView) -> dict[str, Any]:
    """`experts`: by rank the numbers layer * num_experts + expert, ascending."""
    size = published.num_layers * published.num_experts
    return {
        "num_layers": published.num_layers,
        "num_experts": published.num_experts,
        "experts": {
            rank: np.flatnonzero(np.unpackbits(np.frombuffer(bits, np.uint8), count=size)).tolist()
            for rank, bits in published.bits.items()
        },
    }


def changes(view: WatchView | None) -> str:
    """Names the state of targets and decisions."""
    if view is None:
        return ""
    target = [(each.version, each.outcome, each.copies) for each in view.history[-1:]]
    decision = [(each.number, each.outcome) for each in view.decisions[-1:]]
    return f"{target}{decision}"


def log(view: WatchView | None, router_events: Sequence[RouterEvent]) -> dict[str, Any]:
    """Events of the controller and of routers, newest first; targets and decisions, newest first."""
    of_mesh = [] if view is None else [{**asdict(event), "by": "controller"} for event in view.events]
    of_routers = [{**asdict(event), "by": "router"} for event in router_events]
    return {
        "events": sorted([*of_mesh, *of_routers], key=lambda event: event["at"], reverse=True),
        "history": [] if view is None else [entry.to_dict() for entry in reversed(view.history)],
        "decisions": [] if view is None else [decision.to_dict() for decision in reversed(view.decisions)],
    }
