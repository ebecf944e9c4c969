"""`expertmesh`: the commands in the order in which a user needs them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import typer

from cluster.command import bench, canary, check, keys, placement, serve, size, status, version
from placement.command.ending import MEANING, CommandGroup, leave

PROGRAM = "expertmesh"
_CODES = "\n\n".join(f"{int(ending)}: {meaning}" for ending, meaning in MEANING.items())

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Serve Mixture-of-Experts models with the experts apart from the engine.",
    epilog=f"Exit codes:\n\n{_CODES}",
)
A_SERVICE, BEFORE, HERE = "A service", "Before there is one", "This installation"
app.command(rich_help_panel=A_SERVICE)(serve.serve)
app.command(rich_help_panel=A_SERVICE)(status.status)
app.add_typer(placement.app, name="placement", rich_help_panel=A_SERVICE)
app.add_typer(canary.app, name="canary", rich_help_panel=A_SERVICE)
app.add_typer(keys.app, name="keys", rich_help_panel=A_SERVICE)
app.command(rich_help_panel=BEFORE)(size.size)
app.command(rich_help_panel=BEFORE)(check.check)
# What it does not know is the benchmark's.
own = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command(rich_help_panel=HERE, context_settings=own)(bench.bench)
app.command(rich_help_panel=HERE)(version.version)


def main() -> None:
    """Run the command line of this process; ends it with the command's exit code."""
    leave(app(prog_name=PROGRAM, obj=time.perf_counter() - process_age_s(), standalone_mode=False))


def process_age_s() -> float:
    """Seconds since this process started, so that loading the interpreter and compiled code counts too.

    0 where the system does not say (it reads Linux's /proc).
    """
    try:
        started_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(0.0, uptime_s - started_ticks / os.sysconf("SC_CLK_TCK"))
