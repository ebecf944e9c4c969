"""`expertmesh placement`: the planner's commands, and those that show and change a running service."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from placement.command import app as planner
from placement.command.arguments import Json
from placement.command.ending import CommandGroup

if TYPE_CHECKING:
    from cluster.placement_command.session import Session

PANEL = "Run, in a service that is up (asks its controller through Ray)"
APPLY_TIMEOUT_S = 3600.0

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Where experts are: plan it from traces, show and change it in a running service.\n\n"
    "profile, optimize, evaluate, explain and export work on files. All others work on the service of a Ray cluster "
    "(--address); `apply` is what takes a planned file there. Over HTTP the same is below /expertmesh.",
)
app.add_typer(planner.app)


def seconds(text: str) -> float:
    """A bound on a wait, more than 0."""
    try:
        value = float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number of seconds") from None
    if not 0 < value < math.inf:
        raise typer.BadParameter(f"{text} is no number of seconds above 0")
    return value


Address = Annotated[
    str,
    typer.Option(envvar="RAY_ADDRESS", help="Ray cluster of the service; by default the one on this machine."),
]
App = Annotated[str, typer.Option("--app", help="Application that holds the shards.")]
File = Annotated[
    Path, typer.Argument(metavar="FILE", help="Placement as JSON, as `optimize` and `show --save` write it.")
]
Shard = Annotated[str, typer.Argument(metavar="SHARD", help="Rank, process id or replica id.")]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Return once the controller has accepted it.")]
Timeout = Annotated[
    float,
    typer.Option(
        "--timeout-s",
        parser=seconds,
        metavar="S",
        help="Stop following after so many seconds; what moves goes on moving.",
    ),
]


def _with_session(address: str, app_name: str, action: Callable[[Session], Awaitable[None]]) -> None:
    import asyncio

    from cluster.placement_command import session as service

    async def run(session: Session) -> None:
        await action(session)

    with service.connected(address, app_name) as session:
        asyncio.run(run(session))


def _asked(told: Callable[..., Any]) -> Any:
    return app.command(rich_help_panel=PANEL)(told)


@_asked
def show(
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the published placement as JSON.")] = None,
    address: Address = "auto",
    app_name: App = "experts",
    as_json: Json = False,
) -> None:
    """Show the shards by rank, and what moves."""
    from cluster.placement_command import views

    _with_session(address, app_name, lambda session: views.show(session, save=save, as_json=as_json))


@_asked
def diff(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Placement as JSON; by default the target.")
    ] = None,
    address: Address = "auto",
    app_name: App = "experts",
    as_json: Json = False,
) -> None:
    """Show what differs between what is published and the target, or a file."""
    from cluster.placement_command import views

    _with_session(address, app_name, lambda session: views.diff(session, file, as_json=as_json))


@_asked
def apply(
    file: File,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print rounds, bytes and expected seconds alone.")] = False,
    no_wait: NoWait = False,
    timeout_s: Timeout = APPLY_TIMEOUT_S,
    address: Address = "auto",
    app_name: App = "experts",
    as_json: Json = False,
) -> None:
    """Work towards a placement, and follow until it is reached."""
    from cluster.placement_command import changes

    _with_session(
        address,
        app_name,
        lambda session: changes.apply(
            session, file, dry_run=dry_run, wait=not no_wait, timeout_s=timeout_s, as_json=as_json
        ),
    )


@_asked
def drain(
    shard: Shard,
    no_wait: NoWait = False,
    timeout_s: Timeout = APPLY_TIMEOUT_S,
    address: Address = "auto",
    app_name: App = "experts",
    as_json: Json = False,
) -> None:
    """Let the other shards take over what one has, and follow until it is empty."""
    from cluster.placement_command import changes

    _with_session(
        address,
        app_name,
        lambda session: changes.drain(session, shard, wait=not no_wait, timeout_s=timeout_s, as_json=as_json),
    )


@_asked
def undrain(shard: Shard, address: Address = "auto", app_name: App = "experts", as_json: Json = False) -> None:
    """Let a drained shard take experts again."""
    from cluster.placement_command import changes

    _with_session(address, app_name, lambda session: changes.undrain(session, shard, as_json=as_json))


@_asked
def pause(address: Address = "auto", app_name: App = "experts", as_json: Json = False) -> None:
    """Move no more experts after the round at hand."""
    from cluster.placement_command import changes

    _with_session(address, app_name, lambda session: changes.pause(session, as_json=as_json))


@_asked
def resume(address: Address = "auto", app_name: App = "experts", as_json: Json = False) -> None:
    """Go on moving experts."""
    from cluster.placement_command import changes

    _with_session(address, app_name, lambda session: changes.resume(session, as_json=as_json))


@_asked
def history(address: Address = "auto", app_name: App = "experts", as_json: Json = False) -> None:
    """Show the placements that were targets since the controller started."""
    from cluster.placement_command import views

    _with_session(address, app_name, lambda session: views.history(session, as_json=as_json))


@_asked
def autopilot(address: Address = "auto", app_name: App = "experts", as_json: Json = False) -> None:
    """Show what the autopilot sees, does and would do."""
    from cluster.placement_command import views

    _with_session(address, app_name, lambda session: views.autopilot(session, as_json=as_json))
