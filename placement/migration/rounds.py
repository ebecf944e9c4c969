"""What a migration consists of: copies, rounds of them, and the maps before, during and after each round.

L layers, E experts, R ranks, s slots of a rank in the frame of the migration, S = R * s.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from placement.placement import EMPTY, Placement

Nearness = Literal["rank", "node", "rack", "cluster", "checkpoint"]


@dataclass(frozen=True)
class Copy:
    """One expert's weights into one slot; `source_rank` and `source_slot` are -1 for the checkpoint.

    `slot` and `source_slot` are local to their rank. `nearness` is the widest boundary the copy crosses.
    """

    layer: int
    expert: int
    source_rank: int
    source_slot: int
    rank: int
    slot: int
    size_bytes: int
    nearness: Nearness


@dataclass(frozen=True)
class Round:
    """Slots as (layer, rank, local slot). `retired` leave the map before the copies, `dropped` after them."""

    retired: tuple[tuple[int, int, int], ...]
    copies: tuple[Copy, ...]
    dropped: tuple[tuple[int, int, int], ...]

    @property
    def size_bytes(self) -> int:
        return sum(copy.size_bytes for copy in self.copies)


@dataclass(frozen=True, eq=False)
class MigrationPlan:
    """The rounds, and the maps before, during and after each of them.

    `start_LRs` int32 [L, R, s]: what is live before the first round, with lost ranks empty. It has as many ranks and
    slots as the larger of the two placements, or as the shards have room for. `speeds` are the target's.
    """

    num_nodes: int
    nodes: tuple[int, ...]
    num_experts: int
    start_LRs: np.ndarray
    rounds: tuple[Round, ...]
    speeds: tuple[float, ...] | None = None
    _maps: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def num_copies(self) -> int:
        return sum(len(each.copies) for each in self.rounds)

    @property
    def size_bytes(self) -> int:
        return sum(each.size_bytes for each in self.rounds)

    def bytes_by_nearness(self) -> dict[str, int]:
        """Bytes copied, by the widest boundary they cross."""
        total: Counter[str] = Counter()
        for each in self.rounds:
            for copy in each.copies:
                total[copy.nearness] += copy.size_bytes
        return dict(total)

    def map_after(self, num_rounds: int) -> np.ndarray:
        """int32 [L, S]: what is live after so many rounds, 0 for the start. Raises ValueError if out of range."""
        if not 0 <= num_rounds <= len(self.rounds):
            raise ValueError(f"{num_rounds} rounds are asked for, the plan has {len(self.rounds)}")
        if num_rounds not in self._maps:
            done = max((n for n in self._maps if n < num_rounds), default=0)
            map_LRs = self._maps[done].reshape(self.start_LRs.shape).copy() if done else self.start_LRs.copy()
            for each in self.rounds[done:num_rounds]:
                for slot in each.retired + each.dropped:
                    map_LRs[slot] = EMPTY
                for copy in each.copies:
                    map_LRs[copy.layer, copy.rank, copy.slot] = copy.expert
            self._maps[num_rounds] = map_LRs.reshape(len(map_LRs), -1)
        return self._maps[num_rounds].copy()

    def map_during(self, round_index: int) -> np.ndarray:
        """int32 [L, S]: what routers must dispatch by while the copies of a round, counted from 0, are written."""
        map_LRs = self.map_after(round_index).reshape(self.start_LRs.shape)
        for slot in self.rounds[round_index].retired:
            map_LRs[slot] = EMPTY
        return map_LRs.reshape(len(map_LRs), -1)

    def placement_after(self, num_rounds: int) -> Placement:
        """The placement to publish after so many rounds, and to keep if the migration stops there.

        It is partial while an expert that nobody held is not restored.
        """
        map_LS = self.map_after(num_rounds)
        held_LE = np.zeros((len(map_LS), self.num_experts), bool)
        layer, slot = np.nonzero(map_LS != EMPTY)
        held_LE[layer, map_LS[layer, slot]] = True
        num_ranks, partial = self.start_LRs.shape[1], not bool(held_LE.all())
        return Placement(num_ranks, self.num_nodes, self.num_experts, map_LS, self.nodes, partial, self.speeds)

    @property
    def final(self) -> Placement:
        """The target, its experts in the slots they were given."""
        return self.placement_after(len(self.rounds))
