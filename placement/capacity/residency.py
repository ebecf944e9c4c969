"""What it costs that shards have some of their experts in memory only (`shards.offload`): what they keep there, played
through on a trace.

L layers, E experts, R ranks, P places of a layer, I routers; U distinct experts of a call, N some of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from placement.capacity.eviction import coldest, in_parts, most_at_once, note_use, worth_of_layers
from placement.placement import Placement

PCIE_BYTES_PER_S, FILE_BYTES_PER_S = 25e9, 2e9
"""Nominal rates of copies: from host memory to a GPU (PCIe 4, 16 lanes), and from an NVMe disk's file to RAM."""
FORESEEN = 0.7
"""Of the next layer's experts, those that its gate names a layer early: 0.65 to 0.73 on the tiny model."""


@dataclass(frozen=True)
class Offload:
    """How shards offload.

    Attributes:
        resident_fraction: share of a shard's slots in each layer that is in memory, rounded up to whole slots.
        copy_bytes_per_s: rate at which the others come, a shard at a time.
        slots_per_rank: slots of a layer, spare ones among them; None for the placement's.
        foreseen: share of the missing experts that come while the router thinks, as far as that is long enough.
        layers_share: whether a place in memory takes experts of any layer, as on CPUs (`native` kernel), or those of
            its own alone, as on GPUs.
    """

    resident_fraction: float
    copy_bytes_per_s: float
    slots_per_rank: int | None = None
    foreseen: float = 0.0
    layers_share: bool = False

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
    """Which experts are in the memory of each rank, as shards decide it: the hottest of each layer at first, then by
    `placement.capacity.eviction`. Nothing comes early.
    """

    def __init__(self, placement: Placement, load_LE: np.ndarray, offload: Offload) -> None:
        """`load_LE`: tokens of each expert; a rank gets its share of those with replicas."""
        self._layer_places = offload.places(placement)
        self._layers_share = offload.layers_share
        num_layers, num_ranks = placement.num_layers, placement.num_ranks
        self._most = most_at_once(self._layer_places, num_layers, self._layers_share)
        share_LE = load_LE / np.maximum(placement.logical_replica_count, 1)
        held_RLE = placement.slots_LER.transpose(2, 0, 1) >= 0
        hottest_RLP = np.argsort(np.where(held_RLE, -share_LE, np.inf), axis=2, kind="stable")
        hottest_RLP = hottest_RLP[:, :, : self._layer_places]
        self._in_memory_RLE = np.zeros(held_RLE.shape, bool)
        np.put_along_axis(self._in_memory_RLE, hottest_RLP, True, axis=2)
        self._in_memory_RLE &= held_RLE
        self._heat_RLE = np.zeros(held_RLE.shape, np.float32)
        self._worth_LL = worth_of_layers(num_layers)
        self._last_layer_R = [-1] * num_ranks
        self.uses = 0
        self.misses = 0

    def use(self, layer: int, used_IRE: np.ndarray) -> np.ndarray:
        """int64 [I, R]: how many experts of each router's request are missing. The routers' requests come in turn."""
        missing_IR = np.zeros(used_IRE.shape[:2], np.int64)
        for router, rank in np.argwhere(used_IRE.any(2)).tolist():
            missing_IR[router, rank] = self._call(rank, layer, np.flatnonzero(used_IRE[router, rank]))
        self.uses += int(used_IRE.sum())
        self.misses += int(missing_IR.sum())
        return missing_IR

    def _call(self, rank: int, layer: int, used_U: np.ndarray) -> int:
        """How many experts a rank's call waits for; they are in its memory afterwards."""
        in_memory_LE, heat_LE = self._in_memory_RLE[rank], self._heat_RLE[rank]
        missing = 0
        for number, part_N in enumerate(in_parts(used_U, in_memory_LE[layer], self._most)):
            missing_N = part_N[~in_memory_LE[layer, part_N]]
            if missing_N.size:
                self._make_room(rank, layer, part_N, len(missing_N))
                in_memory_LE[layer, missing_N] = True
                missing += len(missing_N)
            note_use(heat_LE[layer], part_N, first_part=number == 0)
            self._last_layer_R[rank] = layer
        return missing

    def _make_room(self, rank: int, layer: int, keep_N: np.ndarray, count: int) -> None:
        """For so many experts of a layer, beside those of it that are kept."""
        layers = slice(None) if self._layers_share else slice(layer, layer + 1)  # that share places
        in_memory_LE = self._in_memory_RLE[rank, layers]
        count -= self._layer_places * len(in_memory_LE) - int(in_memory_LE.sum())
        if count > 0:
            leaving_LE = in_memory_LE.copy()
            leaving_LE[layer if self._layers_share else 0, keep_N] = False
            worth_L = self._worth_LL[self._last_layer_R[rank], layers]
            in_memory_LE.ravel()[coldest(self._heat_RLE[rank, layers], worth_L, leaving_LE, count)] = False

    @property
    def hit_rate(self) -> float:
        """Share of the uses whose expert was in memory; 1 before any."""
        return 1 - self.misses / self.uses if self.uses else 1.0
