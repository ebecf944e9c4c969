"""Who the shards are and what they hold at one epoch, and what a router answers when it applies it."""

from __future__ import annotations

import functools
import hashlib
import os
import socket
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from experts.protocol import membership_bytes
from experts.protocol.plain import exact_fields
from placement.placement import Placement

CPU = "cpu"  # as the device of a shard that computes on no GPU


@functools.cache
def host_id() -> str:
    """Identity of this host for shared memory: same boot, same IPC view of /dev/shm, same network namespace.

    The network namespace is part of it, so that hosts simulated by namespaces do not see each other's memory.
    """
    parts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/net", "/dev/shm"):
        try:
            if path.endswith("net"):
                parts.append(os.readlink(path))
            elif path == "/dev/shm":
                status = os.stat(path)
                parts.append(f"{status.st_dev}:{status.st_ino}")
            else:
                with open(path) as file:
                    parts.append(file.read().strip())
        except OSError:
            parts.append("-")
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ShardEndpoint:
    """Where one incarnation of a shard listens. A restarted shard keeps its rank and changes its incarnation."""

    rank: int
    incarnation: str
    host: str
    port: int
    host_id: str
    pid: int
    device: str = CPU
    """CPU, or the UUID of the GPU that it computes on."""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ShardEndpoint:
        """Inverse of dataclasses.asdict. ValueError names a missing or unknown key."""
        return cls(**exact_fields(cls, data))


@dataclass(frozen=True)
class Membership:
    """The placement of one epoch and the shard that stands at each rank, None where one is missing."""

    epoch: int
    placement: Placement
    endpoints: tuple[ShardEndpoint | None, ...]

    def __post_init__(self) -> None:
        if self.epoch < 0:
            raise ValueError(f"epoch is {self.epoch}, expected 0 or more")
        if len(self.endpoints) != self.placement.num_ranks:
            raise ValueError(
                f"membership has {len(self.endpoints)} endpoints for a placement of {self.placement.num_ranks} ranks"
            )
        for rank, endpoint in enumerate(self.endpoints):
            if endpoint is not None and endpoint.rank != rank:
                raise ValueError(f"endpoint of rank {endpoint.rank} stands at rank {rank}")

    def to_bytes(self) -> bytes:
        """All of it, as it travels to routers and between a router's processes."""
        return membership_bytes.whole(self.epoch, self.placement, endpoints_to_plain(self.endpoints))

    def delta_from(self, older: Membership | None) -> bytes:
        """What changed since `older`, for a receiver that has that; all of it if that is shorter, or `older` is None.

        A few bytes a slot. Ranks or slots that were added or taken away are told as a whole.
        """
        if older is None or older.epoch >= self.epoch or len(older.endpoints) != len(self.endpoints):
            return self.to_bytes()
        pairs = enumerate(zip(self.endpoints, older.endpoints, strict=True))
        changed = {rank: None if new is None else asdict(new) for rank, (new, old) in pairs if new != old}
        told = membership_bytes.difference(self.epoch, self.placement, changed, older.epoch, older.placement)
        if told is not None and len(told) < 2 * self.placement.physical_to_logical_map.size:
            return told
        return min(filter(None, (told, self.to_bytes())), key=len)

    @classmethod
    def from_bytes(cls, data: bytes, known: Membership | None = None) -> Membership:
        """Inverse of `to_bytes`, and of `delta_from` where `known` is what it builds on.

        UnknownEpochError if it is not: ask for the whole. ValueError for what is no membership.
        """
        base = (-1, None) if known is None else (known.epoch, known.placement)
        epoch, placement, plain = membership_bytes.read(data, *base)
        told = dict(zip(plain, endpoints_from_plain(plain.values()), strict=True))
        before = known.endpoints if known is not None and len(known.endpoints) == placement.num_ranks else ()
        endpoints = [*before, *[None] * (placement.num_ranks - len(before))]
        for rank, endpoint in told.items():
            if not 0 <= rank < len(endpoints):
                raise ValueError(f"an endpoint of rank {rank} in a membership of {len(endpoints)} ranks")
            endpoints[rank] = endpoint
        return cls(epoch, placement, tuple(endpoints))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it stands in an engine's settings."""
        return {
            "epoch": self.epoch,
            "placement": self.placement.to_json(),
            "endpoints": endpoints_to_plain(self.endpoints),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Membership:
        """Inverse of `to_dict`. ValueError names a missing or unknown key."""
        values = exact_fields(cls, data)
        return cls(
            epoch=int(values["epoch"]),
            placement=Placement.from_json(values["placement"]),
            endpoints=endpoints_from_plain(values["endpoints"]),
        )


def endpoints_to_plain(endpoints: Iterable[ShardEndpoint | None]) -> list[dict[str, Any] | None]:
    """Endpoints by rank as plain data."""
    return [None if endpoint is None else asdict(endpoint) for endpoint in endpoints]


def endpoints_from_plain(data: Iterable[dict[str, Any] | None]) -> tuple[ShardEndpoint | None, ...]:
    """Inverse of `endpoints_to_plain`. ValueError names a missing or unknown key."""
    return tuple(None if endpoint is None else ShardEndpoint.from_dict(endpoint) for endpoint in data)


@dataclass(frozen=True)
class Preparation:
    """How far a router's worker is with the newest epoch that it was told."""

    epoch: int  # -1 before the first
    ready: bool  # it can be applied
    connecting: list[int]  # ranks whose new shards do not answer yet, ascending
    needs_whole: bool  # it was told as a difference from an epoch that the worker does not have
    error: str  # why it will not be ready; empty otherwise

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it travels over collective_rpc."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Preparation:
        """Inverse of `to_dict`. ValueError names a missing or unknown key."""
        return cls(**exact_fields(cls, data))


@dataclass(frozen=True)
class AppliedMembership:
    """What became of a membership that a router applied."""

    epoch: int
    connected: list[int]  # ranks, ascending
    lost: dict[int, str]  # why there is no link, by rank
    refused: list[int]  # those of the lost ranks whose shard answered and refused this router

    @property
    def refusal(self) -> str | None:
        """Why no shard takes this router, None if one does or none answered: it would compute all experts itself.

        Shards that are away or slow do not count, as they come back.
        """
        if self.connected or not self.refused:
            return None
        return f"no shard takes this router: {'; '.join(sorted({self.lost[rank] for rank in self.refused}))}"

    @property
    def refused_by_all(self) -> bool:
        """Whether the shard of every rank refuses this router, so that no shard is to come back to it."""
        return not self.connected and len(self.refused) == len(self.lost)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it travels over collective_rpc."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AppliedMembership:
        """Inverse of `to_dict`, also after a trip that made keys strings. ValueError names a missing or unknown key."""
        values = exact_fields(cls, data)
        return cls(**{**values, "lost": {int(rank): reason for rank, reason in values["lost"].items()}})
