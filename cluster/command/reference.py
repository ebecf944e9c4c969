"""The page of all commands, docs/cli.md, from their declarations.

python -m cluster.command.reference > docs/cli.md
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import typer

from cluster.command.main import PROGRAM, app
from placement.command.ending import MEANING

_HEAD = """# Commands

Made by `python -m cluster.command.reference`; a test keeps it true.

`expertmesh` comes with the package; where that is only on the path, `python -m cluster.command` is the same. Every
command that prints results takes `--json`: one JSON document goes to the standard output, progress and notes to the
standard error. Errors are lines that begin with `error:`. `expertmesh --install-completion` sets up completion in your
shell. Colours and boxes are for terminals; `NO_COLOR=1` turns colours off there, too.
"""


def page() -> str:
    """Markdown: exit codes, then each command with its arguments and options."""
    root = typer.main.get_command(app)
    lines = [_HEAD, "## Exit codes\n", "| code | |", "|---|---|"]
    lines += [f"| {int(ending)} | {meaning} |" for ending, meaning in MEANING.items()]
    for command, path in _leaves(root, PROGRAM):
        lines += ["", *_command(command, path)]
    return "\n".join(lines) + "\n"


def _leaves(command: Any, path: str) -> Iterator[tuple[Any, str]]:
    """(command, its words) of every command that is no group, in order."""
    if not hasattr(command, "commands"):
        yield command, path
        return
    for name, child in command.commands.items():
        yield from _leaves(child, f"{path} {name}")


def _command(command: Any, path: str) -> Iterator[str]:
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option" and "--help" not in each.opts]
    words = [f"[{_named(each)}]" if not each.required else _named(each) for each in arguments]
    yield f"## {path}\n"
    yield f"`{' '.join([path, *words, '[OPTIONS]'])}`"
    yield ""
    yield command.help or ""
    rows = [(f"`{_named(each)}`", each) for each in arguments]
    rows += [(f"`{', '.join(each.opts)}`{_value(each)}", each) for each in options]
    if rows:
        yield "\n| | default | |\n|---|---|---|"
    for name, each in rows:
        yield f"| {name} | {_default(each)} | {_help(each)} |"


def _named(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def _value(option: Any) -> str:
    """What follows the option: nothing, its choices, or a word for its kind."""
    kind = option.type_descriptor.annotation
    if kind is bool:
        return ""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " " + " \\| ".join(f"`{each.value}`" for each in kind)
    return f" `{option.metavar or {int: 'N', float: 'X', Path: 'FILE'}.get(kind, 'TEXT')}`"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = getattr(parameter.default, "value", parameter.default)
    return "" if value is None or value is False or callable(value) or value == [] else f"`{value}`"


def _help(parameter: Any) -> str:
    text = (parameter.help or "").replace("|", "\\|")
    return f"{text} Variable: `{parameter.envvar}`." if parameter.envvar else text


if __name__ == "__main__":
    print(page(), end="")
