"""What a kernel with fewer places than slots can do, and that for kernels that know nothing of places.

Legend as in base.py. Places are numbered over all layers.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Collection
from typing import Protocol

import numpy as np
import torch

from experts.kernels.base import ExpertKernel, KernelShape
from experts.kernels.native.kernel import NativeKernel
from experts.kernels.native.placed import PlacedNativeKernel
from placement.capacity.eviction import note_use


class PlacedKernel(Protocol):
    """A kernel that computes the slots that stand in one of its places."""

    layer_places: int  # places of a layer; where they are shared, all of them by the number of layers
    shares_places: bool  # whether a place takes slots of any layer, or those of its own alone
    last_use_LS: np.ndarray  # int64: what `clock` said when the slot was used, 0 for never
    heat_LS: np.ndarray  # float32: share of the layer's calls that used the slot, see `note_use`
    called: int  # an eventfd that is told of each call

    @property
    def clock(self) -> int:
        """Calls so far."""

    @property
    def uses(self) -> int:
        """Slots used, summed over calls."""

    @property
    def last_layer(self) -> int:
        """Of the newest call; -1 before the first."""

    def place_views(self, place: int) -> list[torch.Tensor]:
        """The memory of a place, uint8 [n] each."""

    def put_in(self, slots_N: np.ndarray, places_N: np.ndarray) -> None:
        """Slots' experts stand in places: calls may use them. int64 of layer * S + slot; int32."""

    def take_out(self, slots_N: np.ndarray) -> None:
        """Later calls do not find the slots, int64 of layer * S + slot; `await_calls` waits for one that has."""

    def take_wanted(self) -> tuple[int, np.ndarray] | None:
        """The layer and the slots (int64) of the last call, if it was refused; None if it was not, or was taken."""

    def await_calls(self, layers: Collection[int]) -> None:
        """Return when no call still uses a slot of `layers` that was taken out. Not for the thread that calls."""

    def forward_part(
        self,
        layer: int,
        rows_MD: torch.Tensor,
        row_offsets_M1: torch.Tensor,
        slots_N: torch.Tensor,
        weights_N: torch.Tensor,
        out_MD: torch.Tensor,
        first: bool,
        last: bool,
        ranks_N: torch.Tensor | None = None,
        num_pairs: int = 0,
    ) -> None:
        """One of several calls that are one `ExpertKernel.forward`, for the same rows; all its slots have a place.

        Without `ranks_N` slots rise from call to call; see `NativeKernel.forward_part`.
        """

    def takes_any_order(self, num_pairs: int) -> bool:
        """Whether the slots of the calls that are one may come in any order, with so many pairs in all."""

    def compiled_forward(self) -> tuple[int, int] | None:
        """See `ExpertKernel.compiled_forward`; it refuses slots without a place."""


class RemappedKernel:
    """A kernel whose slots are a layer's places. Parts of a call are each rounded to its dtype, summed in float32."""

    shares_places = False

    def __init__(self, kernel: ExpertKernel, num_slots: int) -> None:
        """`num_slots` are to be told from places, which are the slots of `kernel`."""
        self._kernel = kernel
        self.layer_places = kernel.shape.num_slots
        shape = (kernel.shape.num_layers, num_slots)
        self._place_of_slot_LS = np.full(shape, -1, np.int32)
        self.last_use_LS = np.zeros(shape, np.int64)
        self.heat_LS = np.zeros(shape, np.float32)
        self.called = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        weakref.finalize(self, os.close, self.called)
        self.clock, self.uses, self.last_layer = 0, 0, -1
        self._sum_MD: torch.Tensor | None = None

    def place_views(self, place: int) -> list[torch.Tensor]:
        """See `PlacedKernel`."""
        return self._kernel.slot_views(*divmod(place, self.layer_places))

    def put_in(self, slots_N: np.ndarray, places_N: np.ndarray) -> None:
        """See `PlacedKernel`."""
        self._place_of_slot_LS.ravel()[slots_N] = places_N % self.layer_places
        for place in places_N.tolist():
            self._kernel.finish_write(place // self.layer_places, place % self.layer_places)

    def take_out(self, slots_N: np.ndarray) -> None:
        """See `PlacedKernel`."""
        for slot, place in zip(slots_N.tolist(), self._place_of_slot_LS.ravel()[slots_N].tolist(), strict=True):
            self._kernel.begin_write(slot // self._place_of_slot_LS.shape[1], place)

    def take_wanted(self) -> None:
        """It has no compiled form that refuses."""

    def await_calls(self, layers: Collection[int]) -> None:
        """All calls come through `OffloadedKernel.forward`, which says itself what it uses."""

    def takes_any_order(self, num_pairs: int) -> bool:
        """It adds parts up as they come."""
        return True

    def compiled_forward(self) -> tuple[int, int] | None:
        """C++ would not know the places."""
        return None

    def forward_part(
        self,
        layer: int,
        rows_MD: torch.Tensor,
        row_offsets_M1: torch.Tensor,
        slots_N: torch.Tensor,
        weights_N: torch.Tensor,
        out_MD: torch.Tensor,
        first: bool,
        last: bool,
        ranks_N: torch.Tensor | None = None,
        num_pairs: int = 0,
    ) -> None:
        """See `PlacedKernel`."""
        slots_U = np.unique(slots_N.numpy())
        self.clock += 1
        self.last_use_LS[layer, slots_U] = self.clock
        note_use(self.heat_LS[layer], slots_U, first)
        self.uses += len(slots_U)
        self.last_layer = layer
        os.eventfd_write(self.called, 1)
        places_N = torch.from_numpy(self._place_of_slot_LS[layer][slots_N.numpy()])
        self._kernel.forward(layer, rows_MD, row_offsets_M1, places_N, weights_N, out_MD)
        if first and last:
            return
        self._sum_MD = (
            out_MD.to(torch.float32, copy=True) if first or self._sum_MD is None else self._sum_MD.add_(out_MD)
        )
        if last:
            out_MD.copy_(self._sum_MD)
            self._sum_MD = None


def placed(picked: ExpertKernel, shape: KernelShape) -> PlacedKernel:
    """For the slots of `shape`, a kernel like `picked`, which has as many as there shall be places."""
    if isinstance(picked, NativeKernel):
        return PlacedNativeKernel(shape, picked.shape.num_slots)
    return RemappedKernel(picked, shape.num_slots)
