"""Look once, or again and again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from cluster.status_command.look import Look, look
from cluster.status_command.report import report
from cluster.status_command.screen import lines, screen
from placement.command.ending import CommandError, Ending, tell

Show = Callable[[dict[str, Any] | str], None]


@dataclass(frozen=True)
class Service:
    """Where to look, and how."""

    url: str
    console_path: str
    api_key: str | None
    timeout_s: float

    def look(self) -> Look:
        """One look. CommandError if nothing answers."""
        return look(self.url, self.console_path, self.api_key, self.timeout_s)


def once(service: Service, sample_s: float, as_json: bool) -> Ending:
    """Print the status; rates are over `sample_s`, 0 for none."""
    before = None
    if sample_s:
        before = service.look()
        time.sleep(sample_s)
    told = report(service.url, service.look(), before)
    tell(as_json, told, lines(told))
    return _ending(told)


def watch(service: Service, interval_s: float, looks: int | None, as_json: bool) -> Ending:
    """Print the status every `interval_s`, until Ctrl-C or so many `looks`. The last of them gives the exit code.

    A service that does not answer is waited for.
    """
    console = Console(highlight=False)
    if as_json or not console.is_terminal:
        return _watch(service, interval_s, looks, _print_json if as_json else _print)
    with Live(console=console, auto_refresh=False, screen=False) as live:

        def show(told: dict[str, Any] | str) -> None:
            live.update(Text(told) if isinstance(told, str) else screen(told), refresh=True)

        return _watch(service, interval_s, looks, show)


def _watch(service: Service, interval_s: float, looks: int | None, show: Show) -> Ending:
    before, ending, done = None, Ending.UNREACHABLE, 0
    try:
        while True:
            try:
                now = service.look()
            except CommandError as error:
                before, ending = None, error.ending
                show(str(error))
            else:
                told = report(service.url, now, before)
                before, ending = now, _ending(told)
                show(told)
            done += 1
            if done == looks:
                return ending
            time.sleep(interval_s)
    except KeyboardInterrupt:
        return ending


def _print(told: dict[str, Any] | str) -> None:
    text = told if isinstance(told, str) else "\n".join(lines(told))
    print(f"{text}\n", flush=True)


def _print_json(told: dict[str, Any] | str) -> None:
    document = {"healthy": False, "problems": [told]} if isinstance(told, str) else told
    print(json.dumps(document, allow_nan=False), flush=True)


def _ending(told: dict[str, Any]) -> Ending:
    return Ending.DONE if told["healthy"] else Ending.REFUSED
