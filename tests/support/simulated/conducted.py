"""A conductor with ranks that hold what they hold: a test says when routers move on and when a shard does its order."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np

from cluster.mesh.conductor import Conductor
from cluster.mesh.holdings import Holdings, Pair, experts_by_rank, placement_of
from cluster.mesh.messages import ShardOrder
from experts.protocol.orders import CopyOrder, CopyResult
from placement.placement import Placement
from tests.support.rosters import endpoint

EXPERT_BYTES = 10

Rows = dict[int, list[list[int]]]  # experts by rank and layer


class Conducted:
    """Ranks, routers that are all at one epoch, and the conductor. Whatever must hold is checked with every step."""

    def __init__(self, num_experts: int, rows: Rows, slots: dict[int, int], num_layers: int = 1) -> None:
        self.shape = (num_layers, num_experts)
        self.slots = slots
        self.epoch = 0
        self.now_s = 0.0
        self.routers_epoch = 0
        self.late_copies = False  # of rounds that were given up may take slots that the conductor thinks free
        self.holdings = Holdings(num_layers, num_experts)
        self.conductor = Conductor(self.holdings, self._publish, self._endpoint)
        self.conductor.expert_bytes = EXPERT_BYTES
        self.held: dict[int, np.ndarray] = {}  # bool [L, E] by rank: what is really there
        self.done: dict[int, int] = {}  # version of the last order by rank
        self.maps: dict[int, dict[int, np.ndarray]] = {}  # what routers dispatch by at each epoch
        for rank, row in rows.items():
            self.up(rank, row)
        self.move_routers()

    # What happens -----------------------------------------------------------------------------------------------------

    def up(self, rank: int, row: list[list[int]] | None = None) -> None:
        """A shard serves at a rank with these experts."""
        self.held[rank] = self.row(row or [])
        self.done[rank] = -1
        self.holdings.add(rank, self.slots[rank], f"n{rank % 2}", self.held[rank])
        self._publish()
        self.conductor.rank_up(rank)

    def down(self, rank: int) -> None:
        """A rank's shard is gone."""
        del self.held[rank]
        self.holdings.drop(rank)
        self._publish()
        self.conductor.rank_down(rank)

    def aim(self, rows: Rows) -> None:
        """Another target."""
        self.conductor.set_target(self.placement(rows))

    def step(self, seconds: float = 0.0) -> None:
        """The conductor goes on as far as it can."""
        self.now_s += seconds
        served_LE = self.holdings.count_LE > 0
        self.conductor.step(self.now_s, self.routers_epoch)
        self.maps[self.epoch] = {rank: each.published_LE.copy() for rank, each in self.holdings.ranks.items()}
        assert ((self.holdings.count_LE > 0) | ~served_LE).all(), "dropped the last replica of an expert"
        for rank, each in self.holdings.ranks.items():
            assert not (each.published_LE & ~each.held_LE).any(), "published what is not held"
            assert not (each.published_LE & ~self.held[rank]).any(), "published what is not there"

    def move_routers(self) -> None:
        """Every router is at the present epoch, and the conductor goes on."""
        self.step()
        self.routers_epoch = self.epoch
        self.step()

    def order(self, rank: int) -> ShardOrder | None:
        """The order that the rank's shard has to carry out next."""
        return self.conductor.orders.next(rank, self.done[rank])

    def carry_out(self, rank: int, failing: Collection[Pair] = (), lose_results: bool = False) -> bool:
        """The rank's shard does its next order and reports; False if there is none."""
        order = self.order(rank)
        if order is None:
            return False
        self.done[rank] = order.version
        self.release(rank, order)
        results = [self._copied(rank, copy, (copy.layer, copy.expert) in failing) for copy in order.copy]
        self.conductor.report(rank, self.held[rank].copy(), [] if lose_results else results)
        self.step()
        return True

    def release(self, rank: int, order: ShardOrder) -> None:
        """Free slots. AssertionError if a router still dispatches to one."""
        for pair in order.release:
            used = [
                at for at, rows in self.maps.items() if at >= self.routers_epoch and rank in rows and rows[rank][pair]
            ]
            later = [at for at in used if at == self.epoch]
            assert self.routers_epoch not in used, f"rank {rank} releases {pair}, which routers use at {used}"
            assert not later, f"rank {rank} releases {pair}, which is published"
            self.held[rank][pair] = False

    def finish(self, limit: int = 200) -> None:
        """Everyone does what is due until nothing is left. AssertionError if that has no end."""
        for _ in range(limit):
            self.move_routers()
            busy = [self.carry_out(rank) for rank in sorted(self.held)]
            if not any(busy) and not self.conductor.moving and self.routers_epoch == self.epoch:
                return
            self.step(1.0)
        raise AssertionError(f"no end: {self.conductor.phase}, {self.conductor.problem}, {self.published}")

    # What is there ----------------------------------------------------------------------------------------------------

    @property
    def published(self) -> Rows:
        """Experts by rank and layer in the map."""
        return {rank: listed(each.published_LE) for rank, each in sorted(self.holdings.ranks.items())}

    @property
    def leaks(self) -> dict[int, list[Pair]]:
        """What ranks hold that is not in the map."""
        return {
            rank: [(int(layer), int(expert)) for layer, expert in np.argwhere(self.held[rank] & ~each.published_LE)]
            for rank, each in self.holdings.ranks.items()
        }

    def row(self, row: list[list[int]]) -> np.ndarray:
        """bool [L, E] of experts by layer."""
        row_LE = np.zeros(self.shape, np.bool_)
        for layer, experts in enumerate(row):
            row_LE[layer, experts] = True
        return row_LE

    def placement(self, rows: Rows) -> Placement:
        """A placement of these experts."""
        table = {rank: self.row(row) for rank, row in rows.items()}
        width = max(1, *(int(row_LE.sum(1).max()) for row_LE in table.values()))
        return placement_of(table, self.shape, max(table) + 1, width)

    # ------------------------------------------------------------------------------------------------------------------

    def _publish(self) -> int:
        self.epoch += 1
        return self.epoch

    def _endpoint(self, rank: int) -> object:
        return endpoint(rank) if rank in self.held else None

    def _copied(self, rank: int, copy: CopyOrder, fails: bool) -> CopyResult:
        held_LE = self.held[rank]
        if held_LE[copy.layer, copy.expert]:
            return CopyResult(copy.layer, copy.expert, "", 0, 0.0)
        for source in copy.sources:
            assert source.rank != rank, "copies from itself"
        full = held_LE[copy.layer].sum() >= self.slots[rank]
        assert self.late_copies or not full, f"rank {rank} has no free slot for {copy}"
        fails |= bool(full)
        if not fails:
            held_LE[copy.layer, copy.expert] = True
        return CopyResult(copy.layer, copy.expert, "" if fails else "shm", 10, 0.1, "broken" if fails else "")


def listed(row_LE: np.ndarray) -> list[list[int]]:
    """Experts by layer."""
    return [np.flatnonzero(row_E).tolist() for row_E in row_LE]


def rows_of(placement: Placement) -> Rows:
    """Experts by rank and layer of a placement."""
    return {rank: listed(row_LE) for rank, row_LE in experts_by_rank(placement).items()}


def sources(copies: Iterable[CopyOrder]) -> dict[Pair, list[int]]:
    """Ranks that copies come from, by (layer, expert)."""
    return {(copy.layer, copy.expert): [source.rank for source in copy.sources] for copy in copies}


def overwriting() -> Conducted:
    """Full shards: rank 0 has to give up its replica of expert 1 before expert 2 fits."""
    mesh = Conducted(3, {0: [[0, 1]], 1: [[1, 2]]}, {0: 2, 1: 2})
    mesh.aim({0: [[0, 2]], 1: [[1, 2]]})
    return mesh


def exchanging() -> Conducted:
    """Shards with a spare slot exchange experts 1 and 2."""
    mesh = Conducted(4, {0: [[0, 1]], 1: [[2, 3]]}, {0: 3, 1: 3})
    mesh.aim({0: [[0, 2]], 1: [[1, 3]]})
    return mesh
