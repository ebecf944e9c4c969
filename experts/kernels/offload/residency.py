"""Which slots stand in which places, and which ones leave when others come.

A place is free, has a slot, expects one that is being copied (coming), or is being vacated for one: its slot is out of
use, but a call may still read it. `placement.capacity.eviction` says which slot leaves; by its rule a shared place goes
from layer to layer with the tokens.

Legend: L MoE layers, S slots of a layer, P places of all layers.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from experts.kernels.offload.places import PlacedKernel
from placement.capacity.eviction import coldest, worth_of_layers

FREE, VACATED = -1, -2


class Residency:
    """Callers hold `changed`, which is notified when a copy has ended."""

    def __init__(self, kernel: PlacedKernel, num_layers: int, num_slots: int) -> None:
        self.changed = threading.Condition()
        self.place_of_slot_LS = np.full((num_layers, num_slots), -1, np.int32)
        """-1: nowhere, or still coming."""
        self._slot_of_place_P = np.full(num_layers * kernel.layer_places, FREE, np.int64)  # layer * S + slot
        self._coming: dict[tuple[int, int], int] = {}  # places by (layer, slot)
        self._kernel = kernel
        self._use_at_arrival_LS = np.full((num_layers, num_slots), -1, np.int64)  # of those nobody had asked for
        self._using: tuple[int, np.ndarray] | None = None
        self._worth_LL = worth_of_layers(num_layers)
        self.wasted = 0
        """Slots that came before they were asked for, and left without a use."""

    @property
    def using(self) -> bool:
        """Whether `use` says what is in use."""
        return self._using is not None

    def use(self, layer: int, slots_N: np.ndarray) -> None:
        """Until `unuse` these slots stay where they are or will be, and the calling thread uses no others."""
        mask_S = np.zeros(self.place_of_slot_LS.shape[1], np.bool_)
        mask_S[slots_N] = True
        self._using = (layer, mask_S)

    def unuse(self) -> None:
        """The last `use` is over."""
        self._using = None

    def is_in(self, layer: int, slot: int) -> bool:
        """Whether calls find the slot."""
        return bool(self.place_of_slot_LS[layer, slot] >= 0)

    def is_coming(self, layer: int, slot: int) -> bool:
        """Whether a copy of the slot runs."""
        return (layer, slot) in self._coming

    def claim(self, layer: int, slots: Sequence[int]) -> list[tuple[int, int]]:
        """(slot, place) for as many of `slots` as find one, coming from now on, for the thread that calls the kernel.

        It may take places that are being vacated, since no call runs while it asks. None at all: all places are in
        use or expect others; wait for `changed`.
        """
        assert self._using is not None
        places = self._in_state(layer, FREE, len(slots))
        places += self._in_state(layer, VACATED, len(slots) - len(places))
        places += self._evict(layer, len(slots) - len(places), None)[0]
        found = list(zip(slots, places, strict=False))
        for slot, place in found:
            self.expect(layer, slot, place)
        return found

    def vacate(self, layer: int, count: int, keep_S: np.ndarray | None) -> tuple[list[int], set[int]]:
        """Up to `count` places for slots that nobody has asked for yet, and the layers of the slots that left them.

        What stood there is none of `keep_S` (bool [S]) of this layer. No call finds it any more; one that began before
        may still use it. None: free places alone, as many as are the layer's share.
        """
        if keep_S is None:
            here = int((self.place_of_slot_LS[layer] >= 0).sum()) + sum(each == layer for each, _ in self._coming)
            count = min(count, self._kernel.layer_places - here)
        places = self._in_state(layer, FREE, count)
        layers: set[int] = set()
        if keep_S is not None:
            evicted, layers = self._evict(layer, count - len(places), keep_S)
            places += evicted
        self._slot_of_place_P[places] = VACATED
        return places, layers

    def still_vacated(self, place: int) -> bool:
        """Whether a place that was vacated was not claimed since."""
        return bool(self._slot_of_place_P[place] == VACATED)

    def expect(self, layer: int, slot: int, place: int) -> None:
        """A copy of the slot into the place begins."""
        self._slot_of_place_P[place] = layer * self.place_of_slot_LS.shape[1] + slot
        self._coming[layer, slot] = place

    def leave(self, place: int) -> None:
        """A place that was vacated is free."""
        self._slot_of_place_P[place] = FREE

    def arrive(self, layer: int, slots: Sequence[int], unasked: bool) -> None:
        """The copies have ended: calls find the slots."""
        places_N = np.array([self._coming.pop((layer, slot)) for slot in slots], np.int32)
        kernel, slots_N = self._kernel, np.array(slots, np.int64)
        kernel.last_use_LS[layer, slots_N] = kernel.clock
        self._use_at_arrival_LS[layer, slots_N] = kernel.clock if unasked else -1
        self.place_of_slot_LS[layer, slots_N] = places_N
        kernel.put_in(slots_N + layer * self.place_of_slot_LS.shape[1], places_N)
        self.changed.notify_all()

    def miss(self, layer: int, slot: int) -> None:
        """The copy failed, or what was copied is no longer the slot's expert."""
        self._slot_of_place_P[self._coming.pop((layer, slot))] = FREE
        self.changed.notify_all()

    def drop(self, layer: int, slot: int) -> None:
        """The slot's expert changes; no call uses it."""
        if self.is_in(layer, slot):
            self._slot_of_place_P[self._take_out(np.array([layer * self.place_of_slot_LS.shape[1] + slot]))] = FREE

    def count(self) -> int:
        """Slots that calls find, over all layers."""
        return int((self.place_of_slot_LS >= 0).sum())

    def _in_state(self, layer: int, state: int, count: int) -> list[int]:
        """Up to `count` places that take slots of the layer and are FREE or VACATED."""
        if count <= 0:
            return []
        first, places_P = 0, self._slot_of_place_P
        if not self._kernel.shares_places:
            first = layer * self._kernel.layer_places
            places_P = places_P[first : first + self._kernel.layer_places]
        return [first + place for place in np.flatnonzero(places_P == state)[:count].tolist()]

    def _evict(self, layer: int, count: int, keep_S: np.ndarray | None) -> tuple[list[int], set[int]]:
        """Up to `count` places without their slots, and the layers of these; fewer where slots are in use or kept."""
        if count <= 0:
            return [], set()
        leaving_LS = self.place_of_slot_LS >= 0
        if not self._kernel.shares_places:
            leaving_LS[:layer] = leaving_LS[layer + 1 :] = False
        if keep_S is not None:
            leaving_LS[layer] &= ~keep_S
        if self._using is not None:
            leaving_LS[self._using[0]] &= ~self._using[1]
        kernel = self._kernel
        leaving = coldest(kernel.heat_LS, self._worth_LL[kernel.last_layer], leaving_LS, count)
        layers = set((leaving // self.place_of_slot_LS.shape[1]).tolist())
        return self._take_out(leaving).tolist(), layers

    def _take_out(self, slots_N: np.ndarray) -> np.ndarray:
        """The places of slots, int64 of layer * S + slot."""
        places_N = self.place_of_slot_LS.ravel()[slots_N]
        self.place_of_slot_LS.ravel()[slots_N] = -1
        self._kernel.take_out(slots_N)
        unused_N = self._use_at_arrival_LS.ravel()[slots_N] == self._kernel.last_use_LS.ravel()[slots_N]
        self.wasted += int(unused_N.sum())
        self._use_at_arrival_LS.ravel()[slots_N] = -1
        return places_N
