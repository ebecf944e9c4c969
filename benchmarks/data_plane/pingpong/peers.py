"""A peer's process, and how round trips to it are timed."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import IO, Any

from benchmarks.processes import tied
from experts.protocol.settings import TlsFiles

CAPACITY = 1 << 21
LIMIT_S = 60.0
SPIN_US = 50.0


class Peer:
    """A peer's process, and the facts it printed."""

    def __init__(self, mode: str, prefix: list[str], host: str, argument: int = 0, tls: TlsFiles | None = None) -> None:
        command = [*prefix, sys.executable, "-m", "benchmarks.data_plane.transport_pingpong"]
        self._stack = contextlib.ExitStack()
        self.process = self._stack.enter_context(
            tied(
                [
                    *(*command, "--serve", mode, "--peer-host", host, "--argument", str(argument)),
                    *(["--tls", tls.model_dump_json()] if tls is not None else []),
                ],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[argument] if argument else [],
            )
        )  # fmt: skip
        self.facts = self.read()

    def read(self) -> dict[str, Any]:
        """The next line from the peer."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a peer process ended early")
        return json.loads(line)

    def write(self, text: str) -> None:
        """Send the peer a line."""
        stdin: IO[str] | None = self.process.stdin
        assert stdin is not None
        stdin.write(text + "\n")
        stdin.flush()

    def end(self) -> None:
        """End the process."""
        self._stack.close()


Turn = Callable[[int, int], list[float]]
"""(message bytes, round trips) -> microseconds of each round trip, copies in and out included."""


def timed(round_trip: Callable[[bool], None], count: int) -> list[float]:
    times = []
    for turn in range(count):
        start = time.perf_counter()
        round_trip(turn == count - 1)
        times.append((time.perf_counter() - start) * 1e6)
    return times
