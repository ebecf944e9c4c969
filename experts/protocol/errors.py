"""What can go wrong in the data plane, as types that callers tell apart."""

from __future__ import annotations


class ShardError(RuntimeError):
    """A shard did not do what a dispatch asked of it; the rows have to be computed elsewhere."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"shard {rank}: {reason}")
        self.rank = rank
        self.reason = reason


class ShardLostError(ShardError):
    """The shard's process is gone, or its connection is."""


class ShardTimeoutError(ShardError):
    """The shard did not answer before the deadline."""


class ShardRejectedError(ShardError):
    """The shard answered that it cannot serve this request; it lives on."""


class UnsupportedModelError(ValueError):
    """The plug-in cannot serve this model or engine setting; the message says why and what would work."""
