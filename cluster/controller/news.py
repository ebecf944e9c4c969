"""News that callers wait for."""

from __future__ import annotations

import asyncio


class News:
    """Wakes all who wait, again and again."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def announce(self) -> None:
        """Wake those who wait now."""
        self._event.set()
        self._event.clear()

    async def next(self, timeout_s: float) -> None:
        """Wait for the next announcement, at most `timeout_s`."""
        try:
            await asyncio.wait_for(self._event.wait(), max(timeout_s, 0.001))
        except TimeoutError:
            return
