"""Made-up endpoints, and a roster whose shards all serve."""

from __future__ import annotations

from cluster.mesh.roster import Roster
from experts.protocol.membership import ShardEndpoint


def endpoint(rank: int, incarnation: str = "a") -> ShardEndpoint:
    return ShardEndpoint(rank, f"{incarnation}{rank}", "127.0.0.1", 1000 + rank, "host", 1)


def full_roster(num_ranks: int = 3, now_s: float = 0.0) -> Roster:
    """Shards s0, s1, ... serve at ranks 0, 1, ...; Serve's ranks of them are 10, 11, ..."""
    roster = Roster()
    for rank in range(num_ranks):
        roster.sit(f"s{rank}", "n", rank, 10 + rank, now_s)
        assert roster.ready(f"s{rank}", endpoint(rank), 5, now_s)
    return roster
