"""Signals whose effect is awaited: a signal that was sent has not arrived yet."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.support.waiting import await_true


def stop(pid: int) -> None:
    """Send SIGSTOP and wait until every thread has stopped: one may run on for long enough to answer."""
    os.kill(pid, signal.SIGSTOP)
    await_true(lambda: set(_thread_states(pid)) == {"T"}, f"the stop of process {pid}")


def _thread_states(pid: int) -> list[str]:
    """Linux's letter for each thread that is there; one may end between the listing and the reading."""
    states = []
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            states.append(path.read_text().rpartition(")")[2].split()[0])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return states
