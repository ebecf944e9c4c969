"""`expertmesh status`."""

from __future__ import annotations

from typing import Annotated

import typer


def status(
    url: Annotated[
        str,
        typer.Argument(metavar="URL", envvar="EXPERTMESH_URL", help="Where the OpenAI API is, with or without /v1."),
    ] = "http://127.0.0.1:8000",
    watch: Annotated[bool, typer.Option("--watch", help="Look again and again, until Ctrl-C.")] = False,
    interval_s: Annotated[float, typer.Option(min=0.1, help="With --watch: seconds between two looks.")] = 2.0,
    looks: Annotated[int | None, typer.Option(min=1, metavar="N", help="With --watch: end after so many.")] = None,
    sample_s: Annotated[
        float,
        typer.Option(min=0.0, help="Without --watch: seconds over which tokens/s are counted; 0 leaves them out."),
    ] = 1.0,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="EXPERTMESH_API_KEY", help="An admin key, where the console asks for one."),
    ] = None,
    console_path: Annotated[str, typer.Option(help="Route prefix of the console.")] = "/expertmesh",
    timeout_s: Annotated[float, typer.Option(min=0.1, help="Bound on each request.")] = 10.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document; with --watch one a look, each on a line.")
    ] = False,
) -> int:
    """Say how a running service is; exit code 0 if it is well, 1 if not, 3 if nothing answers.

    Routers, shards and their states, epoch, migration, autopilot, tokens a second.
    """
    from cluster.status_command import run

    service = run.Service(url, console_path, api_key, timeout_s)
    if watch:
        return run.watch(service, interval_s, looks, as_json)
    return run.once(service, sample_s, as_json)
