"""The native kernel with memory for some of its slots: C++ finds where each stands, and notes which are used.

Legend as in base.py; P places of a layer.
"""

from __future__ import annotations

import ctypes
import os
import time
import weakref

import numpy as np
import torch

from experts.kernels.base import KernelShape
from experts.kernels.native.kernel import NativeKernel

_LOOK_S = 20e-6  # between two looks at a call that may still use a slot
_MOST_APART_BYTES = 64 << 20  # float32 products of pairs, kept between the parts of a call


class NativePlaces(ctypes.Structure):
    """`Places` of native_mlp.cpp."""

    clock: int
    layer: int
    last_layer: int
    uses: int
    _fields_ = (
        ("count", ctypes.c_int64),
        ("place_of_slot", ctypes.c_void_p),
        ("last_use", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("clock", "layer", "last_layer", "uses", "called")),
    )


class PlacedNativeKernel(NativeKernel):
    """See `PlacedKernel`, whose methods it has."""

    def __init__(self, shape: KernelShape, num_places: int) -> None:
        """Slots of `shape`, of which `num_places` in each layer can be computed at a time."""
        self._place_of_slot_LS = np.full((shape.num_layers, shape.num_slots), -1, np.int32)
        self.last_use_LS = np.zeros((shape.num_layers, shape.num_slots), np.int64)
        self.num_places = num_places
        self.called = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        weakref.finalize(self, os.close, self.called)
        self._places = NativePlaces(
            num_places, self._place_of_slot_LS.ctypes.data, self.last_use_LS.ctypes.data, 0, -1, -1, 0, self.called
        )
        super().__init__(shape, num_places, ctypes.addressof(self._places))

    @property
    def clock(self) -> int:
        """Calls so far."""
        return self._places.clock

    @property
    def uses(self) -> int:
        """Slots used, summed over calls."""
        return self._places.uses

    @property
    def last_layer(self) -> int:
        """Of the newest call; -1 before the first."""
        return self._places.last_layer

    def place_views(self, layer: int, place: int) -> list[torch.Tensor]:
        """The memory of a place, uint8 [n] each."""
        start = (layer * self.num_places + place) * self._slot_bytes
        return [torch.from_numpy(self._packed[start : start + self._slot_bytes])]

    def takes_any_order(self, num_pairs: int) -> bool:
        """If the products of all pairs fit where they are kept until they are added up in the order of slots."""
        return num_pairs * self.shape.hidden_size * 4 <= _MOST_APART_BYTES

    def put_in(self, layer: int, slot: int, place: int) -> None:
        """A slot's expert stands in a place: calls may use it."""
        at = layer * self.shape.num_slots + slot
        self._library.expert_mlp_put_in(
            self._place_of_slot_LS.ctypes.data + 4 * at, place, self._loaded_LS.ctypes.data + at
        )

    def take_out(self, layer: int, slot: int) -> None:
        """Later calls do not find the slot; `await_calls` waits for one that has."""
        at = layer * self.shape.num_slots + slot
        self._library.expert_mlp_take_out(ctypes.addressof(self._places), self._loaded_LS.ctypes.data + at)

    def await_calls(self, layer: int) -> None:
        """Return when no call still uses a slot of `layer` that was taken out. Not for the thread that calls."""
        before = self._places.clock
        # The call in progress has counted itself or will: two more mean that it is over.
        while self._places.layer == layer and self._places.clock < before + 2:
            time.sleep(_LOOK_S)
