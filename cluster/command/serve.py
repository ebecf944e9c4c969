"""`expertmesh serve`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from placement.command.arguments import Json


class Formats(StrEnum):
    """Of log lines."""

    text = "text"
    json = "json"


def serve(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Serve config, such as configs/tiny-cpu.yaml.")],
    port: Annotated[
        int | None,
        typer.Option(envvar="EXPERTMESH_HTTP_PORT", min=1, max=65535, help="HTTP port; by default the config's."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(envvar="RAY_ADDRESS", help="Ray cluster to use; by default a new one on this machine."),
    ] = None,
    timeout_s: Annotated[float, typer.Option(help="Give up if no token is generated within this time.")] = 900.0,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the logs of all processes.")] = False,
    as_json: Json = False,
    log_format: Annotated[
        Formats, typer.Option(help="Of the logs of all processes, and of what is shown.")
    ] = Formats.text,
) -> None:
    """Serve a config on this machine, until Ctrl-C.

    `serve deploy CONFIG` hands the same file to a cluster that runs already.
    """
    from cluster.serving import Options
    from cluster.serving import serve as run

    run(Options(str(config), port, address, timeout_s, verbose, as_json, log_format.value))
