"""Which slots leave, against a sort of all of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.kernels import KERNELS
from experts.kernels.offload.places import PlacedKernel, placed
from experts.kernels.offload.residency import Residency
from placement.capacity.eviction import LATER_IS_WORTH
from tests.support.offloading import SHAPE

LAYERS, SLOTS, PLACES = 4, 5, 3
WIDE = replace(SHAPE, num_layers=LAYERS, num_slots=SLOTS)
NAMES = [name for name in ("native", "torch_loop") if KERNELS[name].supports(SHAPE) is None]


@pytest.fixture(scope="module", params=NAMES)
def kernel(request: pytest.FixtureRequest) -> PlacedKernel:
    return placed(KERNELS[request.param](replace(WIDE, num_slots=PLACES)), WIDE)


def filled(kernel: PlacedKernel) -> Residency:
    """The first slots of each layer have its share of places."""
    residency = Residency(kernel, LAYERS, SLOTS)
    with residency.changed:
        for layer in range(LAYERS):
            places, layers = residency.vacate(layer, SLOTS, None)
            assert (len(places), layers) == (PLACES, set()), "its share, though places may be shared"
            for slot, place in enumerate(places):
                residency.expect(layer, slot, place)
                residency.arrive(layer, [slot], unasked=False)
    return residency


@given(
    heat=st.lists(st.integers(0, 1000), min_size=LAYERS * SLOTS, max_size=LAYERS * SLOTS, unique=True),
    layer=st.integers(0, LAYERS - 1),
    last=st.integers(-1, LAYERS - 1),
    used=st.sets(st.integers(0, PLACES - 1)),
    kept=st.sets(st.integers(0, SLOTS - 1)),
    count=st.integers(0, LAYERS * PLACES + 1),
)
def test_the_coldest_leave_and_of_two_alike_the_one_that_is_needed_later(
    kernel: PlacedKernel, heat: list[int], layer: int, last: int, used: set[int], kept: set[int], count: int
) -> None:
    kernel.heat_LS[:] = np.array(heat, np.float32).reshape(LAYERS, SLOTS) / 1000
    residency = filled(kernel)
    if last >= 0:
        call_nothing(kernel, last)
    worth = {}
    for each in range(LAYERS) if kernel.shares_places else [layer]:
        before = (each - kernel.last_layer - 1) % LAYERS  # calls of other layers before its next one
        for slot in range(PLACES):
            if not (each == 0 and slot in used) and not (each == layer and slot in kept):
                later = 1 - (1 - LATER_IS_WORTH) * before / (LAYERS - 1)
                worth[each, slot] = kernel.heat_LS[each, slot] * later
    with residency.changed:
        residency.use(0, np.array(sorted(used), np.int64))
        places, layers = residency.vacate(layer, count, np.isin(np.arange(SLOTS), list(kept)))
        residency.unuse()
        gone = {(each, slot) for each in range(LAYERS) for slot in range(PLACES) if not residency.is_in(each, slot)}
        assert len(places) == len(set(places)) == len(gone) == min(count, len(worth))
        assert layers == {each for each, _ in gone} <= {each for each, _ in worth}
        assert max((worth[each] for each in gone), default=0) <= min(
            (worth[each] for each in worth.keys() - gone), default=1
        ) * (1 + 1e-6)
        for place in places:
            assert residency.still_vacated(place)
            residency.leave(place)


def call_nothing(kernel: PlacedKernel, layer: int) -> None:
    """A call without rows: it says which layer was last, and changes heat alike in all slots of the layer."""
    nothing = torch.empty(0, dtype=torch.int32)
    rows = torch.empty(0, SHAPE.hidden_size)
    kernel.forward_part(layer, rows, torch.zeros(1, dtype=torch.int32), nothing, torch.empty(0), rows, True, True)


def test_a_call_takes_free_places_first_then_vacated_ones_then_others(kernel: PlacedKernel) -> None:
    residency = filled(kernel)
    with residency.changed:
        keep_but_1 = np.arange(SLOTS) != 1
        others = range(LAYERS) if kernel.shares_places else [1]
        kernel.heat_LS[:] = 1
        kernel.heat_LS[1, 1] = 0
        [vacated], _ = residency.vacate(1, 1, keep_but_1)
        free = int(residency.place_of_slot_LS[1, 0])
        residency.drop(1, 0)
        residency.use(1, np.array([0, 3, 4]))
        assert residency.claim(1, [3]) == [(3, free)]
        assert residency.claim(1, [4]) == [(4, vacated)]
        assert not residency.still_vacated(vacated)
        residency.arrive(1, [3], unasked=False)
        residency.miss(1, 4)
        assert [residency.is_in(1, slot) for slot in range(SLOTS)] == [False, False, True, True, False]
        [(slot, place)] = residency.claim(1, [0])
        assert (slot, place) == (0, vacated), "it is free after the copy that failed"
        [(_, place)] = residency.claim(1, [4])
        assert place not in (free, vacated)
        assert sum(residency.is_in(layer, 2) for layer in others) < len(others) or kernel.shares_places
        residency.unuse()
