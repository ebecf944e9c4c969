"""Who the shards are and what they hold at one epoch: what the controller hands to routers."""

from __future__ import annotations

import functools
import hashlib
import os
import socket
from dataclasses import asdict, dataclass
from typing import Any

from placement.placement import Placement


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

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, as it travels over collective_rpc."""
        return {
            "epoch": self.epoch,
            "placement": self.placement.to_json(),
            "endpoints": [None if e is None else asdict(e) for e in self.endpoints],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Membership:
        """Inverse of `to_dict`."""
        return cls(
            epoch=int(data["epoch"]),
            placement=Placement.from_json(data["placement"]),
            endpoints=tuple(None if e is None else ShardEndpoint(**e) for e in data["endpoints"]),
        )
