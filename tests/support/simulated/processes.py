"""A shard's and a router's process as the simulation knows them: what they hold, and how far they are."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cluster.mesh.holdings import experts_by_rank
from cluster.mesh.target import Target
from experts.protocol.membership import Membership, ShardEndpoint
from experts.protocol.orders import CopyOrder, CopyResult


@dataclass
class FakeShard:
    """One shard's process. It holds what it holds (bool [L, E]), whatever the controller thinks."""

    name: str
    node_id: str
    serve_rank: int
    num_slots: int
    held_LE: np.ndarray
    rank: int | None = None
    alive: bool = True
    stopped: bool = False  # SIGSTOP: it says and does nothing
    leaving: bool = False
    version: int = -1
    term: int = -1
    target: Target | None = None
    todo: list[CopyOrder] = field(default_factory=list)
    rate: float | None = None
    done_at_s: float | None = None  # when the copy at hand ends
    results: list[CopyResult] = field(default_factory=list)

    @property
    def speaks(self) -> bool:
        return self.alive and not self.stopped

    def endpoint(self) -> ShardEndpoint:
        assert self.rank is not None
        return ShardEndpoint(self.rank, self.name, "127.0.0.1", 1000 + self.rank, self.node_id, 1)


@dataclass
class FakeRouter:
    """One router at an epoch."""

    name: str
    membership: Membership | None = None
    alive: bool = True
    slow_s: float = 0.0
    term: int = 0  # the life of the controller that gave out the membership; 0 before the first
    behind_since_s: float | None = None
    sends: dict[str, np.ndarray] = field(default_factory=dict)
    """bool [L, E] by shard: the experts that it sends there."""

    def move_to(self, membership: Membership, term: int) -> None:
        """Dispatch by another epoch from now on. AssertionError if it gives experts to a rank without a shard."""
        self.membership, self.term, self.behind_since_s = membership, term, None
        self.sends = {}
        for rank, row_LE in experts_by_rank(membership.placement).items():
            endpoint = membership.endpoints[rank]
            if endpoint is not None:
                self.sends[endpoint.incarnation] = row_LE
            else:
                assert not row_LE.any(), f"epoch {membership.epoch}: rank {rank} has experts and no shard"
