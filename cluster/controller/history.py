"""What became of each target, for people."""

from __future__ import annotations

from dataclasses import replace

from cluster.mesh.conductor import Conductor
from cluster.mesh.messages import HistoryEntry
from cluster.mesh.target import Target

LONGEST = 200


class History:
    """The targets of one life of the controller, oldest first."""

    def __init__(self) -> None:
        self.entries: list[HistoryEntry] = []
        self._before = (0, 0)

    def note(self, target: Target | None, conductor: Conductor, now: float) -> None:
        """Look at the present target. `now` in seconds since 1970."""
        if target is None:
            return
        counters = conductor.counters
        last = self.entries[-1] if self.entries else None
        if last is None or last.version != target.version:
            if last is not None and last.ended is None:
                self.entries[-1] = replace(last, ended=now, outcome="replaced")
            self._before = (counters.copies, counters.copied_bytes)
            self.entries.append(HistoryEntry(target.version, target.origin, now, None, "under way", 0, 0))
            del self.entries[:-LONGEST]
        last = self.entries[-1]
        if last.ended is None:
            copies, size = counters.copies - self._before[0], counters.copied_bytes - self._before[1]
            done = not conductor.moving
            self.entries[-1] = replace(
                last,
                copies=copies,
                copied_bytes=size,
                ended=now if done else None,
                outcome="reached" if done else "under way",
            )
