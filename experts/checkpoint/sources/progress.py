"""Progress of a download in the log."""

from __future__ import annotations

import logging
import threading
import time

logger = logging.getLogger(__name__)

LOG_PERIOD_S = 5.0


class Progress:
    """Counts the bytes of one download, from several threads, and logs a line every few seconds."""

    def __init__(self, what: str, total_bytes: int) -> None:
        self._what = what
        self._total = total_bytes
        self._done = 0
        self._lock = threading.Lock()
        self._start_s = self._logged_s = time.monotonic()

    def add(self, nbytes: int) -> None:
        """So many bytes more have arrived."""
        with self._lock:
            self._done += nbytes
            now_s = time.monotonic()
            due = now_s - self._logged_s >= LOG_PERIOD_S
            if due:
                self._logged_s = now_s
        if due:
            share = f" ({100 * self._done / self._total:.0f} %)" if self._total else ""
            logger.info(
                "%s: %s of %s fetched%s, %s/s",
                self._what, in_words(self._done), in_words(self._total), share, in_words(self._rate()),
            )  # fmt: skip

    def finish(self) -> None:
        """Log what it took."""
        seconds = time.monotonic() - self._start_s
        logger.info("%s: %s fetched in %.1f s, %s/s", self._what, in_words(self._done), seconds, in_words(self._rate()))

    def _rate(self) -> float:
        return self._done / max(time.monotonic() - self._start_s, 1e-6)


def in_words(nbytes: float) -> str:
    """A number of bytes for people: 1.2 GB."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} GB"
