"""`expertmesh canary`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.command.placement import Address, seconds
from placement.command.arguments import Json
from placement.command.ending import CommandError, CommandGroup

if TYPE_CHECKING:
    from cluster.config.gateway.sections import GatewayLive

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="How much traffic of a model each of its versions gets, behind a gateway (through Ray).\n\n"
    "A change takes effect at once and restarts nothing. It changes the config that Serve runs, not the file.",
)

Gateway = Annotated[str, typer.Option("--app", help="Application that is the gateway.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="The model, as clients name it.")]
Timeout = Annotated[
    float,
    typer.Option("--timeout-s", parser=seconds, metavar="S", help="How long every gateway may take to have it."),
]


@app.command()
def show(address: Address = "auto", app_name: Gateway = "gateway", as_json: Json = False) -> None:
    """Show the versions of each model, their shares and their routers."""
    from cluster.placement_command import session

    with session.connected(address, app_name):
        from cluster.canary_command import run

        run.show(app_name, as_json)


@app.command("set")
def set_weights(
    model: Model,
    weights: Annotated[
        list[str], typer.Argument(metavar="VERSION=WEIGHT...", help="Whole numbers; others keep their weights.")
    ],
    address: Address = "auto",
    app_name: Gateway = "gateway",
    timeout_s: Timeout = 60.0,
    as_json: Json = False,
) -> None:
    """Give versions other weights, such as `canary=5 stable=95`."""
    from cluster.canary_command.change import with_weights

    asked = _weights(weights)
    _change(address, app_name, model, lambda live: with_weights(live, model, asked), timeout_s, as_json)


@app.command()
def promote(
    model: Model,
    version: Annotated[str, typer.Argument(metavar="VERSION", help="The version that gets all the traffic.")],
    address: Address = "auto",
    app_name: Gateway = "gateway",
    timeout_s: Timeout = 60.0,
    as_json: Json = False,
) -> None:
    """Give all the traffic of a model to one version."""
    from cluster.canary_command.change import with_all_for

    _change(address, app_name, model, lambda live: with_all_for(live, model, version), timeout_s, as_json)


@app.command()
def rollback(
    model: Model,
    address: Address = "auto",
    app_name: Gateway = "gateway",
    timeout_s: Timeout = 60.0,
    as_json: Json = False,
) -> None:
    """Give all the traffic of a model back to its stable version."""
    from cluster.canary_command.change import with_all_for

    _change(address, app_name, model, lambda live: with_all_for(live, model, None), timeout_s, as_json)


def _weights(words: list[str]) -> dict[str, int]:
    """Weights by version. CommandError for what is none."""
    found = {}
    for word in words:
        name, _, number = word.rpartition("=")
        if not name or not number.isdecimal():
            raise CommandError(f"{word!r} is no VERSION=WEIGHT with a whole number")
        found[name] = int(number)
    return found


def _change(
    address: str,
    app_name: str,
    model: str,
    changed: Callable[[GatewayLive], GatewayLive],
    timeout_s: float,
    as_json: bool,
) -> None:
    import asyncio

    from cluster.placement_command import session

    with session.connected(address, app_name):
        from cluster.canary_command import run

        asyncio.run(run.change(app_name, model, changed, timeout_s, as_json))
