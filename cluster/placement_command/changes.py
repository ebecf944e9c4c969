"""The actions that change something: apply, drain, undrain, pause, resume; the first two follow what they began."""

from __future__ import annotations

import argparse

from cluster.mesh.messages import ControllerStatus, PlanView
from cluster.placement_command.follow import follow
from cluster.placement_command.session import (
    CALL_TIMEOUT_S,
    PLAN_TIMEOUT_S,
    CommandError,
    Session,
    answered,
    read_placement,
)
from cluster.placement_command.tables import count, seconds, size


async def apply(session: Session, options: argparse.Namespace) -> None:
    """Make a file's placement the target, and follow until it is reached."""
    placement = read_placement(options.file)
    plan = await answered(session.client.apply(placement, options.dry_run, timeout_s=PLAN_TIMEOUT_S))
    if not plan.accepted:
        raise CommandError(f"{options.file} does not fit: {plan.reason}")
    if options.dry_run:
        print(f"{_takes(plan)}; nothing was changed")
        return
    target = plan.target_version
    print(f"target {target}: {_takes(plan)}", flush=True)
    if not options.no_wait:
        await follow(
            session, lambda status: _reached(status, target), f"target {target} to be reached", options.timeout_s
        )


async def drain(session: Session, options: argparse.Namespace) -> None:
    """Let the other shards take over, and follow until the shard is empty."""
    seat = await session.shard(options.shard)
    why_not = await answered(session.client.drain(seat.rank, False, timeout_s=PLAN_TIMEOUT_S))
    if why_not:
        raise CommandError(f"rank {seat.rank} cannot be drained: {why_not}")
    print(f"rank {seat.rank}: draining; {count(seat.experts_held, 'expert')} held", flush=True)
    if not options.no_wait:
        await follow(
            session,
            lambda status: _emptied(status, seat.rank, seat.shard_id),
            f"rank {seat.rank} to be empty",
            options.timeout_s,
        )


async def undrain(session: Session, options: argparse.Namespace) -> None:
    """Let a drained shard take experts again."""
    seat = await session.shard(options.shard)
    why_not = await answered(session.client.drain(seat.rank, True, timeout_s=PLAN_TIMEOUT_S))
    if why_not:
        raise CommandError(f"rank {seat.rank} cannot be taken back: {why_not}")
    print(f"rank {seat.rank}: takes experts again")


async def pause(session: Session, options: argparse.Namespace) -> None:
    """Move no more experts after the round at hand."""
    await answered(session.client.pause(True, timeout_s=CALL_TIMEOUT_S))
    print("paused: nothing moves after the round at hand, lost shards' experts neither; `resume` goes on")


async def resume(session: Session, options: argparse.Namespace) -> None:
    """Go on moving experts."""
    await answered(session.client.pause(False, timeout_s=CALL_TIMEOUT_S))
    print("goes on")


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
        raise CommandError(f"{so_far}, and the migration is paused: `python -m cluster placement resume` goes on")
    if m.problem and not m.moving:
        raise CommandError(f"{so_far}: {m.problem}")
