"""From what is published to a target, as far as its ranks are there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster.mesh.holdings import Holdings, experts_by_rank, placement_of
from placement.migration.plan import Migration
from placement.migration.rounds import Round
from placement.placement import Placement

MOST_COPIES = 256  # of a round: what the controller plans in a tenth of a second
ASSUMED_BYTES_PER_S = 1e9  # of a shard without a limit


@dataclass(frozen=True)
class Pace:
    """How fast a migration may go. `max_bytes_per_s` is of each receiving shard; None: as fast as it can."""

    max_bytes_per_s: float | None
    round_s: float

    @property
    def bytes_per_s(self) -> float:
        """The rate to reckon with."""
        return self.max_bytes_per_s or ASSUMED_BYTES_PER_S

    def rank_bytes(self, expert_bytes: int) -> int:
        """Bytes that a shard gets in one round."""
        return max(expert_bytes, int(self.bytes_per_s * self.round_s))


def migration_to(
    target: Placement, holdings: Holdings, expert_bytes: int, pace: Pace, load_LE: np.ndarray | None
) -> Migration:
    """The migration from what is published. MigrationError if there is no legal order."""
    ranks = holdings.ranks
    num_ranks = max([target.num_ranks, *(rank + 1 for rank in ranks)])
    return Migration(
        holdings.placement(num_ranks),
        reachable(target, holdings, num_ranks),
        expert_bytes=expert_bytes,
        room=[ranks[rank].num_slots if rank in ranks else 0 for rank in range(num_ranks)],
        rank_bytes=pace.rank_bytes(expert_bytes),
        round_bytes=MOST_COPIES * expert_bytes,
        load_LE=load_LE,
    )


def rounds_to(
    target: Placement, holdings: Holdings, expert_bytes: int, pace: Pace, load_LE: np.ndarray | None
) -> list[Round]:
    """All rounds of `migration_to`."""
    return list(iter(migration_to(target, holdings, expert_bytes, pace, load_LE).next_round, None))


def reachable(target: Placement, holdings: Holdings, num_ranks: int) -> Placement:
    """The target on the ranks that are there. While one is awaited, others gain experts and give none away."""
    ranks, wanted = holdings.ranks, experts_by_rank(target)
    shape = (holdings.num_layers, holdings.num_experts)
    nothing_LE = np.zeros(shape, np.bool_)
    rows = {rank: wanted.get(rank, nothing_LE) for rank in ranks}
    if any(row_LE.any() for rank, row_LE in wanted.items() if rank not in ranks):
        rows = {rank: _added(each.published_LE, rows[rank], each.num_slots) for rank, each in ranks.items()}
    width = max([1, *(int(row_LE.sum(1).max()) for row_LE in rows.values())])
    return placement_of(rows, shape, num_ranks, width, *holdings.nodes(num_ranks))


def _added(published_LE: np.ndarray, wanted_LE: np.ndarray, num_slots: int) -> np.ndarray:
    """`published_LE` and as many further experts of `wanted_LE` in each layer as there are free slots."""
    missing_LE = wanted_LE & ~published_LE
    room_L = num_slots - published_LE.sum(1)
    return published_LE | (missing_LE & (np.cumsum(missing_LE, 1) <= room_L[:, None]))
