"""`expertmesh keys`."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated

import typer

from placement.command.ending import CommandError, CommandGroup, note, tell

app = typer.Typer(
    cls=CommandGroup, no_args_is_help=True, pretty_exceptions_enable=False, help="Make API keys with names and limits."
)


class Role(StrEnum):
    """What a key may do."""

    client = "client"
    admin = "admin"


@app.callback()
def keys() -> None:
    """Make API keys with names and limits."""


@app.command()
def new(
    name: Annotated[str, typer.Option(help="Whose key it is, in logs, metrics and usage.")],
    role: Annotated[Role, typer.Option(help="client: the API; admin: see and change the service, too.")] = Role.client,
    requests_per_minute: Annotated[int | None, typer.Option(metavar="N", help="By default no limit.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(metavar="N", help="By default no limit.")] = None,
    concurrency: Annotated[int | None, typer.Option(metavar="N", help="Most requests at the same time.")] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="A model that it may use, once for each; by default all.")
    ] = None,
    stdin: Annotated[bool, typer.Option("--stdin", help="Take a key that is in use from the standard input.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document with the line and the key.")] = False,
) -> None:
    """Make a key, and print the line for http.keys_file.

    The line (also for the variable of http.keys_env) goes to the standard output, and the key itself, which nothing
    keeps, to the standard error: `expertmesh keys new --name X >> keys.yaml`.
    """
    from pydantic import ValidationError

    from cluster.keys.command import line_of, new_key

    key = sys.stdin.read().strip() if stdin else new_key()
    if not key:
        raise CommandError("there is no key on the standard input")
    try:
        line = line_of(
            key,
            name=name,
            role=role.value,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            concurrency=concurrency,
            models=model or [],
        )
    except ValidationError as error:
        raise CommandError(
            *(
                f"--{str(item['loc'][0]).replace('_', '-')}: {item['msg'].removeprefix('Value error, ')}"
                for item in error.errors()
            )
        ) from None
    tell(as_json, {"line": line, **({} if stdin else {"key": key})}, [line])
    if not stdin and not as_json:
        note(f"the key, which is shown this once: {key}")
