"""The command line, and its exit status."""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import sys
from pathlib import Path
from typing import Any

from cluster.placement_command import changes, views
from cluster.placement_command.session import CommandError, Session, connected

APPLY_TIMEOUT_S = 3600.0


def add_placement(commands: Any) -> None:
    """Add `placement` and what it can do to the subparsers of a parser."""
    placement = commands.add_parser(
        "placement",
        help="show and change where experts are",
        description="Show and change where the experts of a running service are. Exit status: 0 done, 1 refused or "
        "failed, 2 wrong usage, 130 interrupted.",
    )
    placement.set_defaults(run=run)
    every = argparse.ArgumentParser(add_help=False)
    every.add_argument(
        "--address",
        default=os.environ.get("RAY_ADDRESS", "auto"),
        help="Ray cluster of the service (RAY_ADDRESS, or the one on this machine)",
    )
    every.add_argument("--app", default="experts", help="application that holds the shards (%(default)s)")
    placement.set_defaults(run=run)
    actions = placement.add_subparsers(required=True, metavar="ACTION")

    def action(name: str, call: Any, told: str) -> argparse.ArgumentParser:
        parser = actions.add_parser(name, parents=[every], help=told, description=told[0].upper() + told[1:] + ".")
        parser.set_defaults(call=call)
        return parser

    show = action("show", views.show, "show the shards by rank, and what moves")
    show.add_argument("--json", action="store_true", help="print the controller's status as JSON")
    show.add_argument("--save", type=Path, metavar="FILE", help="write the published placement as JSON")

    diff = action("diff", views.diff, "show what differs between what is published and the target, or a file")
    diff.add_argument("file", nargs="?", type=Path, metavar="FILE", help="placement as JSON; by default the target")
    diff.add_argument("--json", action="store_true", help="print it as JSON")

    apply = action("apply", changes.apply, "work towards a placement")
    apply.add_argument("file", type=Path, metavar="FILE", help="placement as JSON, as `show --save` writes it")
    apply.add_argument("--dry-run", action="store_true", help="print rounds, bytes and expected seconds alone")
    drain = action("drain", changes.drain, "let the other shards take over what one has")
    for following in (apply, drain):
        following.add_argument("--no-wait", action="store_true", help="return once the controller has accepted it")
        following.add_argument(
            "--timeout-s",
            type=_seconds,
            default=APPLY_TIMEOUT_S,
            help="stop following after so many seconds (%(default)g); what moves goes on moving",
        )
    undrain = action("undrain", changes.undrain, "let a drained shard take experts again")
    for of_shard in (drain, undrain):
        of_shard.add_argument("shard", metavar="SHARD", help="rank, process id or replica id")
    action("pause", changes.pause, "move no more experts after the round at hand")
    action("resume", changes.resume, "go on moving experts")
    history = action("history", views.history, "show the placements that were targets since the controller started")
    pilot = action("autopilot", views.autopilot, "show what the autopilot sees, does and would do")
    for telling in (history, pilot):
        telling.add_argument("--json", action="store_true", help="print it as JSON")


def run(options: argparse.Namespace) -> int:
    """Run the chosen action against the service; returns the exit status."""
    try:
        with connected(options.address, options.app) as session:
            asyncio.run(_call(options, session))
    except CommandError as error:
        print(f"placement: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


async def _call(options: argparse.Namespace, session: Session) -> None:
    await options.call(session, options)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds") from None
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds above 0")
    return value
