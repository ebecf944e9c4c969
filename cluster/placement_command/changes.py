"""The actions that change something: apply, drain, undrain, pause, resume; the first two follow what they began."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TextIO

from cluster.mesh.messages import ControllerStatus, PlanView
from cluster.placement_command.follow import follow
from cluster.placement_command.session import (
    CALL_TIMEOUT_S,
    PLAN_TIMEOUT_S,
    Session,
    answered,
    read_placement,
)
from cluster.placement_command.tables import count, seconds, size
from placement.command.ending import CommandError, tell


async def apply(session: Session, file: Path, *, dry_run: bool, wait: bool, timeout_s: float, as_json: bool) -> None:
    """Make a file's placement the target, and follow until it is reached."""
    placement, out = read_placement(file), _progress_stream(as_json)
    plan = await answered(session.client.apply(placement, dry_run, timeout_s=PLAN_TIMEOUT_S))
    if not plan.accepted:
        raise CommandError(f"{file} does not fit: {plan.reason}")
    target = plan.target_version
    if dry_run:
        tell(as_json, plan.to_dict() | {"dry_run": True}, [f"{_takes(plan)}; nothing was changed"])
        return
    print(f"target {target}: {_takes(plan)}", file=out, flush=True)
    if wait:
        await follow(session, lambda status: _reached(status, target), f"target {target} to be reached", timeout_s, out)
    if as_json:
        tell(True, plan.to_dict() | {"dry_run": False, "reached": wait}, [])


async def drain(session: Session, shard: str, *, wait: bool, timeout_s: float, as_json: bool) -> None:
    """Let the other shards take over, and follow until the shard is empty."""
    seat, out = await session.shard(shard), _progress_stream(as_json)
    why_not = await answered(session.client.drain(seat.rank, False, timeout_s=PLAN_TIMEOUT_S))
    if why_not:
        raise CommandError(f"rank {seat.rank} cannot be drained: {why_not}")
    print(f"rank {seat.rank}: draining; {count(seat.experts_held, 'expert')} held", file=out, flush=True)
    if wait:
        await follow(
            session,
            lambda status: _emptied(status, seat.rank, seat.shard_id),
            f"rank {seat.rank} to be empty",
            timeout_s,
            out,
        )
    if as_json:
        tell(True, {"rank": seat.rank, "shard_id": seat.shard_id, "draining": True, "empty": wait}, [])


async def undrain(session: Session, shard: str, *, as_json: bool) -> None:
    """Let a drained shard take experts again."""
    seat = await session.shard(shard)
    why_not = await answered(session.client.drain(seat.rank, True, timeout_s=PLAN_TIMEOUT_S))
    if why_not:
        raise CommandError(f"rank {seat.rank} cannot be taken back: {why_not}")
    told = {"rank": seat.rank, "shard_id": seat.shard_id, "draining": False}
    tell(as_json, told, [f"rank {seat.rank}: takes experts again"])


async def pause(session: Session, *, as_json: bool) -> None:
    """Move no more experts after the round at hand."""
    await answered(session.client.pause(True, timeout_s=CALL_TIMEOUT_S))
    line = "paused: nothing moves after the round at hand, lost shards' experts neither; `resume` goes on"
    tell(as_json, {"paused": True}, [line])


async def resume(session: Session, *, as_json: bool) -> None:
    """Go on moving experts."""
    await answered(session.client.pause(False, timeout_s=CALL_TIMEOUT_S))
    tell(as_json, {"paused": False}, ["goes on"])


def _progress_stream(as_json: bool) -> TextIO:
    """Where progress goes: standard output is for the document, if there is one."""
    return sys.stderr if as_json else sys.stdout


def _takes(plan: PlanView) -> str:
    if not plan.copies:
        return "no copies"
    nearness = ", ".join(f"{name} {size(number)}" for name, number in sorted(plan.bytes_by_nearness.items()))
    total = sum(plan.bytes_by_nearness.values())
    return (
        f"{count(plan.copies, 'copy', 'copies')} in {count(plan.rounds, 'round')}, {size(total)} (from {nearness}), "
        f"about {seconds(plan.expected_s)}"
    )


def _reached(status: ControllerStatus, target: int) -> str:
    """What to tell once the target is reached, empty before. CommandError if it will not be."""
    m = status.migration
    if m.target_version != target and not m.origin.startswith("shards"):
        raise CommandError(f"target {target} was replaced by target {m.target_version} ({m.origin})")
    _stuck(status, f"target {target} is not reached")
    if m.moving or status.missing_ranks or any(seat.experts_missing for seat in status.shards):
        return ""
    if m.target_version != target:
        return f"target {m.target_version} reached, into which target {target} became ({m.origin})"
    return f"target {target} reached, epoch {status.epoch}"


def _emptied(status: ControllerStatus, rank: int, shard_id: str) -> str:
    """What to tell once the shard is empty, empty before. CommandError if it will not be."""
    seat = next((seat for seat in status.shards if seat.shard_id == shard_id), None)
    if seat is None:
        return f"rank {rank}: the shard is gone"
    if not seat.experts_held:
        return f"rank {rank}: empty; its shard may stop"
    if seat.state != "draining":
        raise CommandError(f"rank {rank} is no longer drained: its state is {seat.state}")
    _stuck(status, f"rank {rank} still holds {count(seat.experts_held, 'expert')}")
    return ""


def _stuck(status: ControllerStatus, so_far: str) -> None:
    """CommandError if nothing will move any more by itself."""
    m = status.migration
    if m.paused:
        raise CommandError(f"{so_far}, and the migration is paused: `expertmesh placement resume` goes on")
    if m.problem and not m.moving:
        raise CommandError(f"{so_far}: {m.problem}")
