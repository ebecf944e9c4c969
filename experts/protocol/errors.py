"""Errors of the data plane, one type for each case that callers handle differently."""

from __future__ import annotations


class ShardError(RuntimeError):
    """A shard did not do what a dispatch asked of it; its rows must be computed elsewhere."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"shard {rank}: {reason}")
        self.rank = rank
        self.reason = reason


class ShardLostError(ShardError):
    """The shard's process or its connection is gone."""


class ShardTimeoutError(ShardError):
    """The shard did not answer before the deadline."""


class ShardRejectedError(ShardError):
    """The shard refused this request; the shard itself is still alive."""


class MissingSlotError(ShardError):
    """The shard serves, but holds no slot for one of the experts it was asked for."""

    def __init__(self, rank: int, reason: str, layer: int, expert: int) -> None:
        super().__init__(rank, reason)
        self.layer = layer
        self.expert = expert


class UnsupportedModelError(ValueError):
    """The plug-in does not support this model or engine setting; the message says why and what would work."""
