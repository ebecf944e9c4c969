"""A progress bar for work that takes over two seconds, on standard error if that is a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType

QUIET_SECONDS = 2.0
WIDTH = 30


class ProgressBar:
    """A context manager; call `update(done, total)` from one thread. Draws nothing in the first two seconds."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._start_s = time.monotonic()
        self._drawn = False

    def __enter__(self) -> ProgressBar:
        return self

    def update(self, done: int, total: int) -> None:
        """Draw `done` of `total`."""
        seconds = time.monotonic() - self._start_s
        if not sys.stderr.isatty() or seconds < QUIET_SECONDS:
            return
        filled = WIDTH * done // max(total, 1)
        left = seconds / max(done, 1) * (total - done)
        print(
            f"\r[{'#' * filled}{'.' * (WIDTH - filled)}] {done}/{total} {self._what}, {left:.0f} s left ",
            end="",
            file=sys.stderr,
            flush=True,
        )
        self._drawn = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._drawn:
            print(file=sys.stderr)
