"""The native kernel with memory for some of its slots: C++ finds where each stands, and notes which are used.

Legend as in base.py.
"""

from __future__ import annotations

import ctypes
import os
import time
import weakref
from collections.abc import Collection

import numpy as np
import torch

from experts.kernels.base import KernelShape
from experts.kernels.native.kernel import NativeKernel
from placement.capacity.eviction import HEAT_STEP

_LOOK_S = 20e-6  # between two looks at a call that may still use a slot
_MOST_APART_BYTES = 64 << 20  # float32 products of pairs, kept between the parts of a call


class NativePlaces(ctypes.Structure):
    """`Places` of native_mlp.cpp."""

    clock: int
    layer: int
    last_layer: int
    uses: int
    wanted_layer: int
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("place_of_slot", "last_use", "heat", "wanted")),
        ("wanted_layer", ctypes.c_int64),
        ("heat_step", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("clock", "layer", "last_layer", "uses", "called")),
    )


class PlacedNativeKernel(NativeKernel):
    """See `PlacedKernel`, whose methods it has."""

    shares_places = True

    def __init__(self, shape: KernelShape, layer_places: int) -> None:
        """Slots of `shape`, of which `layer_places` a layer, summed over layers, can be computed at a time."""
        self._place_of_slot_LS = np.full((shape.num_layers, shape.num_slots), -1, np.int32)
        self.last_use_LS = np.zeros((shape.num_layers, shape.num_slots), np.int64)
        self.heat_LS = np.zeros((shape.num_layers, shape.num_slots), np.float32)
        self._wanted_S = np.zeros(shape.num_slots, np.bool_)
        self.layer_places = layer_places
        self.called = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        weakref.finalize(self, os.close, self.called)
        self._places = NativePlaces(
            self._place_of_slot_LS.ctypes.data, self.last_use_LS.ctypes.data, self.heat_LS.ctypes.data,
            self._wanted_S.ctypes.data, -1, HEAT_STEP, 0, -1, -1, 0, self.called,
        )  # fmt: skip
        super().__init__(shape, layer_places, ctypes.addressof(self._places))

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

    def place_views(self, place: int) -> list[torch.Tensor]:
        """The memory of a place, uint8 [n] each."""
        start = place * self._slot_bytes
        return [torch.from_numpy(self._packed[start : start + self._slot_bytes])]

    def takes_any_order(self, num_pairs: int) -> bool:
        """If the products of all pairs fit where they are kept until they are added up in the order of slots."""
        return num_pairs * self.shape.hidden_size * 4 <= _MOST_APART_BYTES

    def put_in(self, slots_N: np.ndarray, places_N: np.ndarray) -> None:
        """Slots' experts stand in places: calls may use them. int64 of layer * S + slot; int32."""
        self._library.expert_mlp_put_in(
            self._place_of_slot_LS.ctypes.data,
            self._loaded_LS.ctypes.data,
            slots_N.ctypes.data,
            places_N.ctypes.data,
            len(slots_N),
        )

    def take_out(self, slots_N: np.ndarray) -> None:
        """Later calls do not find the slots, int64 of layer * S + slot; `await_calls` waits for one that has."""
        self._library.expert_mlp_take_out(self._loaded_LS.ctypes.data, slots_N.ctypes.data, len(slots_N))

    def take_wanted(self) -> tuple[int, np.ndarray] | None:
        """The layer and the slots (int64) of the last call, if it was refused; None if it was not, or was taken."""
        layer, self._places.wanted_layer = self._places.wanted_layer, -1
        return None if layer < 0 else (layer, np.flatnonzero(self._wanted_S))

    def await_calls(self, layers: Collection[int]) -> None:
        """Return when no call still uses a slot of `layers` that was taken out. Not for the thread that calls."""
        before = self._places.clock
        # The call in progress has counted itself or will: two more mean that it is over.
        while self._places.layer in layers and self._places.clock < before + 2:
            time.sleep(_LOOK_S)
