"""The slots that a router may choose from: those of live shards, and only local ones where an expert has any.

L MoE layers, E logical experts, R ranks, S slots.
"""

from __future__ import annotations

import numpy as np

from placement.compiled import compiled
from placement.placement import Placement
from placement.rule.local_replicas import keep_local


class LiveSlots:
    """One router's slots in one epoch. `choose_replicas` reads `chosen_from_LER` (int32, -1 for no slot)."""

    def __init__(self, placement: Placement, local_R: np.ndarray | None = None) -> None:
        """Replicas on the ranks `local_R` (bool) come first; None prefers no rank."""
        shape = (placement.num_layers, placement.num_experts, placement.num_ranks)
        self._live_LER = np.empty(shape, np.int32)
        self._holders_LE = np.empty(shape[:2], np.int32)
        _fill(placement.physical_to_logical_map, placement.slots_per_rank, self._live_LER, self._holders_LE)
        self._local_R = local_R
        self.chosen_from_LER = self._live_LER
        if local_R is not None:
            self.chosen_from_LER = keep_local(self._live_LER, local_R)

    @property
    def uncovered(self) -> int:
        """(layer, expert) pairs that no live rank holds."""
        return int(np.count_nonzero(self._holders_LE == 0))

    def has(self, layer: int, expert: int, rank: int) -> bool:
        """Whether the rank's slot for an expert counts as live; False for an expert that the model lacks."""
        _, num_experts, _ = self._live_LER.shape
        return 0 <= expert < num_experts and bool(self._live_LER[layer, expert, rank] >= 0)

    def lose(self, rank: int) -> None:
        """Leave a rank out; experts that were local to it alone are chosen from other ranks from now on."""
        self._lose(slice(None), slice(None), rank)

    def lose_layer(self, layer: int, rank: int) -> int:
        """Leave out all that a rank has of a layer; returns how many experts that is."""
        return self._lose(slice(layer, layer + 1), slice(None), rank)

    def lose_expert(self, layer: int, expert: int, rank: int) -> int:
        """Leave out a rank's slot for one expert; returns 1, or 0 if it was out already."""
        return self._lose(slice(layer, layer + 1), slice(expert, expert + 1), rank)

    def _lose(self, layers: slice, experts: slice, rank: int) -> int:
        live_LE = self._live_LER[layers, experts, rank]  # a view
        was_live_LE = live_LE >= 0
        self._holders_LE[layers, experts] -= was_live_LE
        live_LE[:] = -1
        if self._local_R is not None:
            self.chosen_from_LER[layers, experts] = keep_local(self._live_LER[layers, experts], self._local_R)
        return int(np.count_nonzero(was_live_LE))


@compiled()
def _fill(map_LS: np.ndarray, slots_per_rank: int, slots_LER: np.ndarray, holders_LE: np.ndarray) -> None:
    """The first slot of each expert on each rank, and how many ranks have one; one call, without the GIL."""
    num_layers, num_slots = map_LS.shape
    slots_LER[:] = -1
    holders_LE[:] = 0
    for layer in range(num_layers):
        for slot in range(num_slots):
            expert = map_LS[layer, slot]
            rank = slot // slots_per_rank
            if expert >= 0 and slots_LER[layer, expert, rank] < 0:
                slots_LER[layer, expert, rank] = slot
                holders_LE[layer, expert] += 1


def warm_up() -> None:
    """Load or compile what a first epoch needs."""
    LiveSlots(Placement.linear(1, 1, 1))
