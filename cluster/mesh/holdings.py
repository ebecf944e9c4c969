"""What each shard holds, what routers dispatch by, and what is on its way out: plain tables, without Ray or a clock.

Legend: L MoE layers, E logical experts, R ranks.

An expert on a rank passes through four states. Only published ones are in the map that routers get:

    (absent) --copied--> held --publish--> published --retire--> retired --released by the shard--> (absent)

A retired expert still answers, since routers may be at an older epoch. Its shard may release it once every router is
at the epoch without it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from placement.placement import EMPTY, Placement

Pair = tuple[int, int]  # layer, expert


@dataclass
class RankHolding:
    """One shard's experts."""

    num_slots: int
    node_id: str
    held_LE: np.ndarray
    published_LE: np.ndarray
    retired: dict[Pair, int] = field(default_factory=dict)
    """The first epoch whose map lacks the expert."""


class Holdings:
    """The shards' experts by rank. What is published is always held."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_layers = num_layers
        self.num_experts = num_experts
        self.ranks: dict[int, RankHolding] = {}

    def add(self, rank: int, num_slots: int, node_id: str, held_LE: np.ndarray) -> None:
        """A shard serves at `rank`. Whatever it holds (bool [L, E]) is published. ValueError for another model."""
        held_LE = self._checked(held_LE)
        self.ranks[rank] = RankHolding(num_slots, node_id, held_LE, held_LE.copy())

    def drop(self, rank: int) -> bool:
        """The rank's shard is gone. Returns whether anything published went with it."""
        gone = self.ranks.pop(rank, None)
        return gone is not None and bool(gone.published_LE.any())

    def report(self, rank: int, held_LE: np.ndarray) -> bool:
        """What the shard holds now. Returns whether the published map named something that it lacks."""
        holding = self.ranks[rank]
        holding.held_LE = self._checked(held_LE)
        lacking_LE = holding.published_LE & ~holding.held_LE
        holding.published_LE &= holding.held_LE
        holding.retired = {pair: epoch for pair, epoch in holding.retired.items() if holding.held_LE[pair]}
        return bool(lacking_LE.any())

    def publish(self, rank: int, pairs: Iterable[Pair]) -> None:
        """Put experts into the map; those that the shard does not hold are left out."""
        holding = self.ranks[rank]
        for pair in pairs:
            holding.published_LE[pair] = holding.held_LE[pair]
            holding.retired.pop(pair, None)

    def publish_all(self) -> bool:
        """Publish what is held and not retired. Returns whether that changed the map."""
        changed = False
        for rank, holding in self.ranks.items():
            stray_LE = self.stray_LE(rank)
            changed |= bool(stray_LE.any())
            holding.published_LE |= stray_LE
        return changed

    def stray_LE(self, rank: int) -> np.ndarray:
        """bool [L, E]: what the shard holds that is neither published nor retired."""
        holding = self.ranks[rank]
        stray_LE = holding.held_LE & ~holding.published_LE
        for pair in holding.retired:
            stray_LE[pair] = False
        return stray_LE

    def retire(self, rank: int, pairs: Iterable[Pair], epoch: int) -> None:
        """Take experts out of the map; `epoch` is the first one without them."""
        holding = self.ranks[rank]
        for pair in pairs:
            if holding.published_LE[pair]:
                holding.published_LE[pair] = False
                holding.retired[pair] = epoch

    def restore(self, ordered: Iterable[tuple[int, int, int]] = ()) -> bool:
        """Publish what was retired again, but for (rank, layer, expert) whose release was `ordered` already.

        Returns whether that changed the map.
        """
        spared = set(ordered)
        changed = False
        for rank, holding in self.ranks.items():
            for pair in [pair for pair in holding.retired if (rank, *pair) not in spared]:
                holding.published_LE[pair] = True
                del holding.retired[pair]
                changed = True
        return changed

    def releasable(self, rank: int, routers_epoch: int) -> list[Pair]:
        """Retired experts that no router at `routers_epoch` or later dispatches to any more."""
        return sorted(pair for pair, epoch in self.ranks[rank].retired.items() if epoch <= routers_epoch)

    @property
    def count_LE(self) -> np.ndarray:
        """int32 [L, E]: on how many ranks each expert is published."""
        count_LE = np.zeros((self.num_layers, self.num_experts), np.int32)
        for holding in self.ranks.values():
            count_LE += holding.published_LE
        return count_LE

    def placement(self, num_ranks: int) -> Placement:
        """The published map as a placement of `num_ranks` ranks; partial if an expert has no slot."""
        return self._placement(num_ranks, {rank: each.published_LE for rank, each in self.ranks.items()})

    def held_placement(self, num_ranks: int) -> Placement:
        """What shards hold and is not retired."""
        table = {}
        for rank, holding in self.ranks.items():
            table[rank] = holding.held_LE.copy()
            for pair in holding.retired:
                table[rank][pair] = False
        return self._placement(num_ranks, table)

    def nodes(self, num_ranks: int) -> tuple[int, tuple[int, ...]]:
        """(number of nodes, the node of each rank); nodes are numbered in the order of their first ranks."""
        number: dict[str, int] = {}
        nodes = []
        for rank in range(num_ranks):
            holding = self.ranks.get(rank)
            nodes.append(0 if holding is None else number.setdefault(holding.node_id, len(number)))
        return max(len(number), 1), tuple(nodes)

    def _placement(self, num_ranks: int, table: dict[int, np.ndarray]) -> Placement:
        width = max([int(held_LE.sum(1).max()) for held_LE in table.values()], default=0)
        num_nodes, nodes = self.nodes(num_ranks)
        shape = (self.num_layers, self.num_experts)
        return placement_of(table, shape, num_ranks, max(width, 1), num_nodes, nodes)

    def _checked(self, held_LE: np.ndarray) -> np.ndarray:
        expected = (self.num_layers, self.num_experts)
        if held_LE.shape != expected or held_LE.dtype != np.bool_:
            raise ValueError(
                f"what a shard holds is {held_LE.dtype} {list(held_LE.shape)}, expected bool {list(expected)}"
            )
        return held_LE.copy()


def placement_of(
    table: dict[int, np.ndarray],
    shape_LE: tuple[int, int],
    num_ranks: int,
    width: int,
    num_nodes: int = 1,
    nodes: tuple[int, ...] | None = None,
) -> Placement:
    """A placement from bool [L, E] by rank, its slots filled in the order of experts; partial if experts are missing.

    `width` is the number of slots a rank, at least as many as any row needs.
    """
    num_layers, num_experts = shape_LE
    map_LRs = np.full((num_layers, num_ranks, width), EMPTY, np.int32)
    held_LE = np.zeros((num_layers, num_experts), np.bool_)
    for rank, rank_LE in table.items():
        layer_N, expert_N = np.nonzero(rank_LE)
        first_L = np.concatenate([[0], np.cumsum(rank_LE.sum(1))[:-1]])
        map_LRs[layer_N, rank, np.arange(len(layer_N)) - first_L[layer_N]] = expert_N
        held_LE |= rank_LE
    return Placement(
        num_ranks,
        num_nodes,
        num_experts,
        map_LRs.reshape(num_layers, -1),
        nodes=nodes if num_nodes > 1 else None,
        partial=not held_LE.all(),
    )


def experts_by_rank(placement: Placement) -> dict[int, np.ndarray]:
    """bool [L, E] of each rank of a placement."""
    return {rank: experts_at(placement, rank) for rank in range(placement.num_ranks)}


def experts_at(placement: Placement, rank: int) -> np.ndarray:
    """bool [L, E] of one rank of a placement."""
    experts_Ls = placement.experts_of_rank(rank)
    held_LE = np.zeros((placement.num_layers, placement.num_experts), np.bool_)
    layer_N, slot_N = np.nonzero(experts_Ls != EMPTY)
    held_LE[layer_N, experts_Ls[layer_N, slot_N]] = True
    return held_LE
