"""Which slots stand in which places of a layer, and which one leaves when another comes.

A place is free, has a slot, expects one that is being copied (coming), or is being vacated for one: its slot is out of
use, but a call may still read it.

Legend: L MoE layers, S slots of a layer, P places of a layer.
"""

from __future__ import annotations

import threading

import numpy as np

from experts.kernels.offload.places import PlacedKernel

FREE, VACATED = -1, -2


class Residency:
    """Callers hold `changed`, which is notified when a copy has ended."""

    def __init__(self, kernel: PlacedKernel, num_layers: int, num_slots: int) -> None:
        self.changed = threading.Condition()
        self.place_of_slot_LS = np.full((num_layers, num_slots), -1, np.int32)
        """-1: nowhere, or still coming."""
        self._slot_of_place_LP = np.full((num_layers, kernel.num_places), FREE, np.int32)
        self._coming: dict[tuple[int, int], int] = {}  # places by (layer, slot)
        self._kernel = kernel
        self._use_at_arrival_LS = np.full((num_layers, num_slots), -1, np.int64)  # of those nobody had asked for
        self._using: tuple[int, np.ndarray] | None = None
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

    def claim(self, layer: int, slot: int) -> int | None:
        """A place for `slot`, which is coming from now on, for the thread that calls the kernel.

        It may take a place that is being vacated, since no call runs while it asks. None: all places are in use or
        expect others; wait for `changed`.
        """
        assert self._using is not None
        places_P = self._slot_of_place_LP[layer]
        found = np.flatnonzero(places_P == FREE)
        if not found.size:
            found = np.flatnonzero(places_P == VACATED)
        place = int(found[0]) if found.size else self._evict(layer, None)
        if place is not None:
            self.expect(layer, slot, place)
        return place

    def vacate(self, layer: int, keep_S: np.ndarray) -> int | None:
        """A place for a slot that nobody has asked for yet, or None; what stood there is none of `keep_S` (bool).

        No call finds its slot any more; one that began before may still use it.
        """
        free = np.flatnonzero(self._slot_of_place_LP[layer] == FREE)
        place = int(free[0]) if free.size else self._evict(layer, keep_S)
        if place is not None:
            self._slot_of_place_LP[layer, place] = VACATED
        return place

    def still_vacated(self, layer: int, place: int) -> bool:
        """Whether a place that was vacated was not claimed since."""
        return bool(self._slot_of_place_LP[layer, place] == VACATED)

    def expect(self, layer: int, slot: int, place: int) -> None:
        """A copy of the slot into the place begins."""
        self._slot_of_place_LP[layer, place] = slot
        self._coming[layer, slot] = place

    def leave(self, layer: int, place: int) -> None:
        """A place that was vacated is free."""
        self._slot_of_place_LP[layer, place] = FREE

    def arrive(self, layer: int, slot: int, unasked: bool) -> None:
        """The copy has ended: calls find the slot. It counts as just used."""
        place = self._coming.pop((layer, slot))
        kernel = self._kernel
        kernel.last_use_LS[layer, slot] = kernel.clock
        self._use_at_arrival_LS[layer, slot] = kernel.clock if unasked else -1
        self.place_of_slot_LS[layer, slot] = place
        kernel.put_in(layer, slot, place)
        self.changed.notify_all()

    def miss(self, layer: int, slot: int) -> None:
        """The copy failed, or what was copied is no longer the slot's expert."""
        self._slot_of_place_LP[layer, self._coming.pop((layer, slot))] = FREE
        self.changed.notify_all()

    def drop(self, layer: int, slot: int) -> None:
        """The slot's expert changes; no call uses it."""
        if self.is_in(layer, slot):
            self._slot_of_place_LP[layer, self._take_out(layer, slot)] = FREE

    def count(self) -> int:
        """Slots that calls find, over all layers."""
        return int((self.place_of_slot_LS >= 0).sum())

    def _evict(self, layer: int, keep_S: np.ndarray | None) -> int | None:
        """The place of the slot that was used longest ago, without it; None if all are in use, kept or coming."""
        leaving_S = self.place_of_slot_LS[layer] >= 0
        if keep_S is not None:
            leaving_S &= ~keep_S
        if self._using is not None and self._using[0] == layer:
            leaving_S &= ~self._using[1]
        candidates = np.flatnonzero(leaving_S)
        if not candidates.size:
            return None
        return self._take_out(layer, int(candidates[self._kernel.last_use_LS[layer, candidates].argmin()]))

    def _take_out(self, layer: int, slot: int) -> int:
        place = int(self.place_of_slot_LS[layer, slot])
        self.place_of_slot_LS[layer, slot] = -1
        self._kernel.take_out(layer, slot)
        self.wasted += int(self._use_at_arrival_LS[layer, slot] == self._kernel.last_use_LS[layer, slot])
        self._use_at_arrival_LS[layer, slot] = -1
        return place
