"""The actions that change nothing: show, diff, history, autopilot."""

from __future__ import annotations

from pathlib import Path

from cluster.autopilot.messages import AutopilotView
from cluster.mesh.messages import ControllerStatus, MigrationView, SeatView
from cluster.placement_command.difference import Difference, difference
from cluster.placement_command.session import CALL_TIMEOUT_S, Session, answered, read_placement
from cluster.placement_command.tables import count, local_time, seconds, size, table
from placement.command.ending import CommandError, tell


async def show(session: Session, *, save: Path | None, as_json: bool) -> None:
    """Print who is where and what moves; write the published placement to a file."""
    status = await session.status()
    if save is not None:
        view = await answered(session.client.placement(timeout_s=CALL_TIMEOUT_S))
        try:
            view.placement.save(save)
        except OSError as error:
            raise CommandError(f"{save}: cannot be written: {error.strerror}") from None
    lines = [*_lines(status), "", _shards(status.shards)]
    if save is not None:
        lacks = ", which lacks experts and so is no target" if view.placement.partial else ""
        lines += ["", f"{save}: the placement of epoch {view.epoch}{lacks}"]
    tell(as_json, status.to_dict(), lines)


def progress_of(m: MigrationView) -> str:
    """What moves, in one line."""
    if m.paused and m.moving:
        return f"paused, {count(m.copies_left, 'copy', 'copies')} left"
    if not m.moving:
        return "nothing moves"
    if not m.copies_left:
        return f"{m.phase}, planning" if m.phase == "idle" else f"{m.phase}, no copies left"
    left = f"{count(m.copies_left, 'copy', 'copies')} left ({size(m.bytes_left)})"
    return f"{m.phase}, {left}, {m.copies_in_flight} in flight"


async def diff(session: Session, file: Path | None, *, as_json: bool) -> None:
    """Print what differs between what is published and the target, or a file."""
    status = await session.status()
    view = await answered(session.client.placement(timeout_s=CALL_TIMEOUT_S))
    if file is not None:
        wanted, name = read_placement(file), str(file)
    elif view.target is not None:
        wanted, name = view.target, f"target {view.target_version}"
    else:
        raise CommandError("there is no target yet: the shards of the first placement are not all there")
    try:
        found = difference(view.placement, wanted)
    except ValueError as error:
        raise CommandError(f"{name}: {error}") from None
    expert_bytes = _expert_bytes(status)
    lines = [f"from epoch {view.epoch} to {name}:", "", _by_rank(found, expert_bytes), "", _by_layer(found)]
    if not found.copies and not found.releases:
        lines = [f"nothing: epoch {view.epoch} gives every rank the experts of {name}"]
    tell(as_json, found.to_dict(expert_bytes), lines)


async def history(session: Session, *, as_json: bool) -> None:
    """Print what became of each target in this life of the controller."""
    entries = await answered(session.client.history(timeout_s=CALL_TIMEOUT_S))
    rows = [
        (
            entry.version,
            entry.origin,
            local_time(entry.begun),
            "-" if entry.ended is None else seconds(entry.ended - entry.begun),
            entry.outcome,
            entry.copies,
            size(entry.copied_bytes),
        )
        for entry in entries
    ]
    lines = [table(("target", "origin", "since", "took", "outcome", "copies", "copied"), rows)]
    tell(as_json, [entry.to_dict() for entry in entries], lines)


async def autopilot(session: Session, *, as_json: bool) -> None:
    """Print what the autopilot sees and does, and what became of its plans."""
    status = await session.status()
    decisions = await answered(session.client.decisions(timeout_s=CALL_TIMEOUT_S))
    header = ("plan", "since", "outcome", "predicted", "measured", "copies", "moved", "target", "why")
    rows = [
        (
            f"{each.number} {each.kind}",
            local_time(each.at),
            each.outcome,
            share(each.predicted_gain, each.predicted_noise),
            share(each.measured_gain, each.measured_noise),
            each.copies,
            size(each.size_bytes),
            each.target_version or "-",
            each.why,
        )
        for each in decisions
    ]
    told = {"autopilot": status.autopilot.to_dict(), "decisions": [decision.to_dict() for decision in decisions]}
    tell(as_json, told, [*autopilot_lines(status.autopilot), "", table(header, rows)])


def autopilot_lines(view: AutopilotView) -> list[str]:
    """What the autopilot sees and does, a line a thing."""
    lines = [f"autopilot   {view.mode}; {view.state}{f': {view.frozen}' if view.frozen else ''}"]
    if (window := view.window) is not None:
        tokens = ", ".join(f"{tokens} of {phase}" for phase, tokens in window.tokens.items())
        lines += [
            f"window      {window.seconds:.0f} s, {window.steps} steps, tokens: {tokens}",
            f"shards      {window.fan_out:.2f} a token and layer, balancedness {window.balancedness:.2f}",
            f"drift       {share(window.drift, window.drift_noise)}; {count(view.drifting, 'window')} running",
        ]
        if window.found is not None and window.copy_cost_us is not None:
            lines.append(
                f"offload     {window.found:.1%} of the experts asked for in memory; copies of others take "
                f"{window.copy_cost_us:.3g} of {window.step_cost_us:.3g} us a step (predicted)"
            )
    return [*lines, f"problem     {view.problem}"] if view.problem else lines


def share(value: float | None, noise: float | None) -> str:
    """A share with its standard error, in percent."""
    if value is None:
        return "-"
    return f"{value:+.1%}" + ("" if noise is None else f" +- {noise:.1%}")


def _lines(status: ControllerStatus) -> list[str]:
    m = status.migration
    lacking = [f"{count(m.unserved, 'expert')} of a layer served by no shard"] if m.unserved else []
    if status.missing_ranks:
        lacking.append(f"no shard at rank {', '.join(map(str, status.missing_ranks))}")
    behind = {name: router.epoch for name, router in status.routers.items() if router.epoch < status.epoch}
    routers = count(len(status.routers), "router")
    if behind:
        routers += "; behind: " + ", ".join(f"{name} at epoch {epoch}" for name, epoch in sorted(behind.items()))
    lines = [
        f"epoch       {status.epoch}; {'; '.join(lacking) or 'every expert is served'}",
        f"target      {m.target_version} ({m.origin})" if m.target_version else "target      none yet",
        f"migration   {'paused; ' if m.paused and not m.moving else ''}{progress_of(m)}",
        f"done        {count(m.rounds, 'round')}, {count(m.copies, 'copy', 'copies')}, {size(m.copied_bytes)}, "
        f"{m.failed_copies} failed (since the controller started)",
        f"sole copies {m.sole_copies} (experts of a layer that one shard alone serves)",
        f"routers     {routers}",
        *autopilot_lines(status.autopilot)[:1],
    ]
    return [*lines, f"problem     {m.problem}"] if m.problem else lines


def _shards(seats: list[SeatView]) -> str:
    header = ("rank", "state", "slots", "held", "missing", "node", "pid", "replica")
    rows = [
        (
            seat.rank,
            seat.state,
            seat.num_slots or "-",
            seat.experts_held,
            seat.experts_missing,
            seat.node_id[:8],
            seat.pid or "-",
            seat.shard_id,
        )
        for seat in seats
    ]
    return table(header, rows)


def _expert_bytes(status: ControllerStatus) -> int | None:
    """Bytes of one expert's weights, as a shard that has some says."""
    for seat in status.shards:
        if seat.status is not None and seat.status.loaded_experts:
            return seat.status.loaded_bytes // seat.status.loaded_experts
    return None


def _by_rank(found: Difference, expert_bytes: int | None) -> str:
    def row(name: object, copies: int, releases: int) -> tuple[object, ...]:
        return name, copies, releases, "?" if expert_bytes is None else size(copies * expert_bytes)

    by_rank = zip(found.gained_LR.sum(0).tolist(), found.lost_LR.sum(0).tolist(), strict=True)
    rows = [row(rank, *both) for rank, both in enumerate(by_rank) if any(both)]
    return table(("rank", "copies", "releases", "bytes"), [*rows, row("all", found.copies, found.releases)])


def _by_layer(found: Difference) -> str:
    """Copies of each layer, and to which ranks."""
    rows = []
    for layer, gained_R in enumerate(found.gained_LR.tolist()):
        releases = int(found.lost_LR[layer].sum())
        if sum(gained_R) or releases:
            to = ", ".join(f"{copies} to rank {rank}" for rank, copies in enumerate(gained_R) if copies)
            rows.append((layer, sum(gained_R), releases, to))
    return table(("layer", "copies", "releases", ""), rows)
