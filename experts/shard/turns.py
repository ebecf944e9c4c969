"""Whose requests a shard computes next: those of routers that generate before those of routers that compute prompts."""

from __future__ import annotations

from experts.transports.base import ShardChannel

# So many batches of others go before a request of a deferred channel, so that prompts get on however many generate.
MAX_PASSED_OVER = 8

Waiting = list[tuple[ShardChannel, int]]  # channels with a request, and its bytes


class Turns:
    """For pairs that Python serves; `serve_batch` in native/shard.h does the same for compiled ones."""

    def __init__(self) -> None:
        self._passed_over = 0  # batches since a deferred request waits

    def choose(self, waiting: Waiting) -> Waiting:
        """Those to answer now: all of one kind. Empty only if none waits."""
        first = [(channel, nbytes) for channel, nbytes in waiting if not channel.deferred]
        deferred = [(channel, nbytes) for channel, nbytes in waiting if channel.deferred]
        if not deferred or (first and self._passed_over < MAX_PASSED_OVER):
            self._passed_over = self._passed_over + 1 if deferred else 0
            return first
        self._passed_over = 0
        return deferred
