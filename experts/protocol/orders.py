"""What the controller tells a shard to copy, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass

from experts.protocol.membership import ShardEndpoint


@dataclass(frozen=True)
class CopyOrder:
    """One expert's weights into a free slot of the shard that gets the order."""

    layer: int
    expert: int
    sources: tuple[ShardEndpoint, ...] = ()  # shards that hold it, best first; after those the checkpoint


@dataclass(frozen=True)
class CopyResult:
    """What became of one order."""

    layer: int
    expert: int
    source: str  # process, shm, tcp or checkpoint; empty if it failed, or if the shard held the expert already
    size_bytes: int
    seconds: float
    error: str = ""  # why there is no copy, one line; empty if the shard holds the expert now
