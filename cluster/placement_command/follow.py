"""Following what the controller does, with a line of progress."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

from cluster.mesh.messages import ControllerStatus
from cluster.placement_command.session import Session
from cluster.placement_command.tables import seconds, size
from cluster.placement_command.views import progress_of
from placement.command.ending import CommandError

POLL_S = 0.5
RATE_OVER_S = 5.0
LINE_EVERY_S = 2.0  # where lines cannot be overwritten


async def follow(
    session: Session, done: Callable[[ControllerStatus], str], what: str, timeout_s: float, stream: TextIO
) -> None:
    """Print progress to `stream` until `done` says what to tell; it raises CommandError if that will never be.

    CommandError after `timeout_s`, or if it is interrupted; what moves goes on moving then.
    """
    start_s = time.monotonic()
    line, rate, doing = _Line(start_s, stream), _Rate(), "nothing is known yet"
    try:
        while True:
            try:
                status = await session.status()
            except CommandError as error:
                doing = str(error)  # serving and copying go on without the controller, and Serve restarts it
            else:
                told = done(status)
                if told:
                    line.last(told)
                    return
                doing = rate.of(status)
            line.show(doing)
            if time.monotonic() - start_s >= timeout_s:
                raise CommandError(f"waited {timeout_s:g} s for {what} ({doing}); it goes on without this command")
            await asyncio.sleep(POLL_S)
    except asyncio.CancelledError:
        line.last(f"interrupted while waiting for {what}; it goes on without this command")
        raise
    finally:
        line.end()


class _Rate:
    """Bytes a second of copies, over the last seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()
        self._term = ""

    def of(self, status: ControllerStatus) -> str:
        """The progress, with the rate and the time left as far as it is known."""
        m, now_s = status.migration, time.monotonic()
        if status.term != self._term:  # the counters start over with the controller
            self._seen.clear()
            self._term = status.term
        self._seen.append((now_s, m.copied_bytes))
        while now_s - self._seen[0][0] > RATE_OVER_S and len(self._seen) > 2:
            self._seen.popleft()
        text = progress_of(m)
        (first_s, first), (last_s, last) = self._seen[0], self._seen[-1]
        if last > first:
            rate = (last - first) / (last_s - first_s)
            text += f", {size(rate)}/s"
            if m.bytes_left:
                text += f", about {seconds(m.bytes_left / rate)} left"
        return f"{text}; {m.problem}" if m.problem else text


class _Line:
    """One line that is written over on a terminal; elsewhere one line now and then."""

    def __init__(self, start_s: float, stream: TextIO) -> None:
        self._start_s, self._shown_s, self._shown = start_s, float("-inf"), ""
        self._stream = stream
        self._over = stream.isatty()
        self._open = False

    def show(self, text: str) -> None:
        now_s = time.monotonic()
        stamped = f"[{now_s - self._start_s:5.1f} s] {text}"
        if self._over:
            self._stream.write(f"\r\x1b[K{stamped}")
            self._open = True
        elif text != self._shown and now_s - self._shown_s >= LINE_EVERY_S:
            self._shown, self._shown_s = text, now_s
            self._stream.write(f"{stamped}\n")
        self._stream.flush()

    def last(self, text: str) -> None:
        """Show a line that stays."""
        self._shown_s = float("-inf")
        self.show(text)
        self.end()

    def end(self) -> None:
        if self._open:
            self._stream.write("\n")
            self._stream.flush()
            self._open = False
