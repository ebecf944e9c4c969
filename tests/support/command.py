"""`expertmesh` in tests: in this process, or as a process of its own.

COMMAND is the module behind the console script, so that a checkout's own code runs whatever is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from cluster.command.main import PROGRAM, app

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "cluster.command"]


def run_here(*words: object) -> int:
    """The exit code of a command line; what it prints goes where this process prints."""
    return int(app([str(word) for word in words], prog_name=PROGRAM, standalone_mode=False))


def environment(**more: str) -> dict[str, str]:
    """For a process that runs COMMAND in any folder: this checkout's code, a wide terminal without colours."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "NO_COLOR": "1", **more}


def run_command(
    *words: object, cwd: Path = ROOT, timeout_s: float = 120.0, **more: str
) -> subprocess.CompletedProcess[str]:
    """A finished process of COMMAND, with its output."""
    return subprocess.run(
        [*COMMAND, *map(str, words)],
        cwd=cwd,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
