"""What it costs that shards have some of their experts in memory only (`shards.offload`): a cache of each layer, played
through on a trace.

L layers, E experts, R ranks, I routers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from placement.placement import Placement


@dataclass(frozen=True)
class Offload:
    """How shards offload.

    Attributes:
        resident_fraction: share of a shard's slots in each layer that is in memory, rounded up to whole slots.
        copy_bytes_per_s: rate at which the others come, a shard at a time.
        slots_per_rank: slots of a layer, spare ones among them; None for the placement's.
        foreseen: share of the missing experts that come while the router thinks, as far as that is long enough.
    """

    resident_fraction: float
    copy_bytes_per_s: float
    slots_per_rank: int | None = None
    foreseen: float = 0.0

    def __post_init__(self) -> None:
        for name, most in (("resident_fraction", 1.0), ("copy_bytes_per_s", math.inf)):
            value = getattr(self, name)
            if not 0 < value <= most:
                raise ValueError(f"{name} is {value}, expected more than 0" + (" and at most 1" if most == 1 else ""))
        if not 0 <= self.foreseen <= 1:
            raise ValueError(f"foreseen is {self.foreseen}, expected 0 to 1")

    def places(self, placement: Placement) -> int:
        """Slots of a layer that are in a shard's memory at a time."""
        slots = self.slots_per_rank or placement.slots_per_rank
        return min(max(math.ceil(self.resident_fraction * slots), 1), slots)

    def wait_s(self, missing: np.ndarray, expert_bytes: float, think_s: float) -> np.ndarray:
        """float64 like `missing`, counts of experts: seconds that a call waits for their copies."""
        copies_s = missing * (expert_bytes / self.copy_bytes_per_s)
        return copies_s - np.minimum(self.foreseen * copies_s, think_s)


class Residents:
    """Which experts are in the memory of each rank: first the hottest, then those that were used last."""

    def __init__(self, placement: Placement, load_LE: np.ndarray, places: int) -> None:
        """`load_LE`: tokens of each expert; a rank gets its share of those with replicas."""
        self._places = places
        share_LE = load_LE / np.maximum(placement.logical_replica_count, 1)
        coldest_first_LE = np.argsort(np.argsort(share_LE, axis=1, kind="stable"), axis=1) - share_LE.shape[1]
        held_LER = placement.slots_LER >= 0
        self._last_use_LRE = np.where(
            held_LER.transpose(0, 2, 1), coldest_first_LE[:, None, :].astype(np.float64), -np.inf
        )
        self._now = 0
        self.uses = 0
        self.misses = 0

    def use(self, layer: int, used_IRE: np.ndarray) -> np.ndarray:
        """int64 [I, R]: how many experts of each router's request are missing. The routers' requests come in turn."""
        missing_IR = np.zeros(used_IRE.shape[:2], np.int64)
        last_use_RE = self._last_use_LRE[layer]
        for router, used_RE in enumerate(used_IRE):
            if self._places < last_use_RE.shape[1]:
                newest_RP = np.argpartition(-last_use_RE, self._places - 1, axis=1)[:, : self._places]
                in_memory_RE = np.zeros(used_RE.shape, bool)
                np.put_along_axis(in_memory_RE, newest_RP, True, axis=1)
                missing_IR[router] = (used_RE & ~in_memory_RE).sum(1)
            self._now += 1
            last_use_RE[used_RE] = self._now
        self.uses += int(used_IRE.sum())
        self.misses += int(missing_IR.sum())
        return missing_IR

    @property
    def hit_rate(self) -> float:
        """Share of the uses whose expert was in memory; 1 before any."""
        return 1 - self.misses / self.uses if self.uses else 1.0
