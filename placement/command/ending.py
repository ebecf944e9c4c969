"""How a command of `expertmesh` ends: its exit code, and one line that says why."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

# typer's own class of wrong usage, which it exports under no name.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

LEAVE_S = 10.0
"""How long a command that has told its result may take to end, for what its libraries left running."""


class Ending(IntEnum):
    """Exit codes, the same for every command."""

    DONE = 0
    REFUSED = 1
    USAGE = 2
    UNREACHABLE = 3
    INTERRUPTED = 130


MEANING = {
    Ending.DONE: "done; for `status` and `check`: all is well",
    Ending.REFUSED: "refused, failed, or not well: the input, the config or the service says no",
    Ending.USAGE: "wrong usage: an unknown option, or a value that it does not take",
    Ending.UNREACHABLE: "nothing answers: no service at the URL, no Ray cluster at the address",
    Ending.INTERRUPTED: "interrupted by Ctrl-C (`serve` and `status --watch`, which end that way, return 0)",
}


class CommandError(RuntimeError):
    """Why a command was refused or failed: one line for each reason. `ending` becomes the exit code."""

    def __init__(self, *reasons: str, ending: Ending = Ending.REFUSED) -> None:
        super().__init__("\n".join(" ".join(reason.split()) for reason in reasons))
        self.ending = ending


class CommandGroup(TyperGroup):
    """The commands of an app. What goes wrong is told in one line, without a frame around it."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line. Exits with its code, or (not `standalone_mode`) returns it."""
        try:
            ending = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra) or Ending.DONE
        except CommandError as error:
            for line in str(error).splitlines():
                note(f"error: {line}")
            ending = error.ending
        except UsageError as error:
            ending = Ending.USAGE
            _tell_usage(error)
        if standalone_mode:
            sys.exit(int(ending))
        return int(ending)


def leave(code: int) -> NoReturn:
    """End this process with `code`, within LEAVE_S whatever its libraries left running.

    Ray's threads were once seen to keep a command that was done for minutes.
    """
    late = threading.Timer(LEAVE_S, os._exit, (code,))
    late.daemon = True
    late.start()
    sys.exit(code)


@contextlib.contextmanager
def refusing(*kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of `kinds`, by default ValueError and OSError, into CommandError."""
    told = kinds or (ValueError, OSError)
    try:
        yield
    except told as error:
        if isinstance(error, OSError) and error.filename:
            raise CommandError(f"{error.filename}: {error.strerror}") from None
        raise CommandError(str(error)) from None


def tell(as_json: bool, document: Any, lines: Iterable[str]) -> None:
    """Print the result of a command: one JSON document, or lines for people."""
    print(json.dumps(document, allow_nan=False) if as_json else "\n".join(lines), flush=True)


def note(text: str) -> None:
    """Print what is no result: progress, notes."""
    print(text, file=sys.stderr, flush=True)


def _tell_usage(error: Any) -> None:
    message, context = (
        " ".join(error.format_message().split()).replace("Value error, ", "").removesuffix("."),
        error.ctx,
    )
    cause = error.__cause__  # pydantic's, which says what was expected, and not of what
    value = repr(cause.errors()[0]["input"]) if hasattr(cause, "errors") else ""
    if value not in message:
        message += f", got {value}"
    if not message:  # no arguments at all: the help has been printed
        return
    help_line = f" (`{context.command_path} --help` lists what there is)" if context is not None else ""
    note(f"error: {message}{help_line}")
