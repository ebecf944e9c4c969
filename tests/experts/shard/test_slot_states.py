"""The slot table under any order of calls, against a model of sets: no slot is lost, none is used twice."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from experts.shard import slots as slots_module
from experts.shard.slots import SlotTable

LAYERS, EXPERTS = 2, 5
PAIRS = st.tuples(st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1))


class Kernel:
    """Knows which slots it may compute with."""

    shape = SimpleNamespace(expert_bytes=1, device="cpu")

    def __init__(self) -> None:
        self.loaded: set[tuple[int, int]] = set()

    def begin_write(self, layer: int, slot: int) -> None:
        self.loaded.discard((layer, slot))


class Clock:
    """Time passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += 10.0


class Slots(RuleBasedStateMachine):
    @initialize(num_slots=st.integers(1, EXPERTS + 1))
    def begin(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.kernel = Kernel()
        checkpoint: Any = SimpleNamespace(spec=SimpleNamespace(num_layers=LAYERS, num_experts=EXPERTS))
        kernel: Any = self.kernel
        self.table = SlotTable(checkpoint, kernel, num_slots, torch.float32)
        self.held: dict[tuple[int, int], int] = {}
        self.digests: dict[tuple[int, int], bytes] = {}
        self.writing: list[tuple[int, int, int]] = []
        self.in_use: set[tuple[int, int]] = set()  # what the current request may read
        self.retired: set[tuple[int, int]] = set()  # of those, what was released meanwhile
        self.requesting = False

    @rule(pair=PAIRS)
    def reserve(self, pair: tuple[int, int]) -> None:
        layer, expert = pair
        taken = [slot for (at, _), slot in self.held.items() if at == layer]
        taken += [slot for at, _, slot in self.writing if at == layer]
        taken += [slot for at, slot in self.retired if at == layer]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(slots_module, "time", Clock())
            if pair in self.held:
                assert self.table.reserve(layer, expert) is None
            elif len(taken) < self.num_slots:
                slot = self.table.reserve(layer, expert)
                assert slot is not None
                assert slot not in taken
                self.writing.append((layer, expert, slot))
            elif any(at == layer for at, _ in self.retired):
                with pytest.raises(TimeoutError):
                    self.table.reserve(layer, expert)
            else:
                with pytest.raises(ValueError, match="no free slot"):
                    self.table.reserve(layer, expert)

    @precondition(lambda self: self.writing)
    @rule(data=st.data(), works=st.booleans(), digest=st.binary(min_size=32, max_size=32))
    def end_of_writing(self, data: st.DataObject, works: bool, digest: bytes) -> None:
        number = data.draw(st.integers(0, len(self.writing) - 1))
        layer, expert, slot = self.writing.pop(number)
        # The mover never writes one expert twice at a time.
        if works and (layer, expert) not in self.held:
            self.kernel.loaded.add((layer, slot))
            self.table.publish(layer, expert, slot, digest)
            self.held[layer, expert] = slot
            self.digests[layer, expert] = digest
        else:
            self.table.give_up(layer, slot)

    @rule(pairs=st.lists(PAIRS, max_size=4))
    def release(self, pairs: list[tuple[int, int]]) -> None:
        expected = {pair for pair in pairs if pair in self.held}
        assert self.table.release(pairs) == len(expected)
        for layer, expert in expected:
            slot = self.held.pop((layer, expert))
            del self.digests[layer, expert]
            if self.requesting:
                self.retired.add((layer, slot))

    @precondition(lambda self: not self.requesting)
    @rule()
    def begin_request(self) -> None:
        self.table.begin_request()
        self.requesting = True
        self.in_use = {(layer, slot) for (layer, _), slot in self.held.items()}

    @precondition(lambda self: self.requesting)
    @rule()
    def end_request(self) -> None:
        self.table.end_request()
        self.requesting = False
        self.in_use, self.retired = set(), set()

    @invariant()
    def nothing_is_lost(self) -> None:
        free = LAYERS * self.num_slots - len(self.held) - len(self.writing) - len(self.retired)
        assert self.table.num_free == free
        assert self.table.num_loaded == len(self.held)
        held_Ls = np.full((LAYERS, self.num_slots), -1, np.int32)
        for (layer, expert), slot in self.held.items():
            held_Ls[layer, slot] = expert
        np.testing.assert_array_equal(self.table.held_Ls(), held_Ls)

    @invariant()
    def a_request_can_use_what_it_found(self) -> None:
        assert self.in_use <= self.kernel.loaded

    @invariant()
    def the_digest_is_that_of_what_is_held(self) -> None:
        other = SlotTable(self.table.checkpoint, self.table.kernel, self.num_slots, torch.float32)
        other._digests = dict(self.digests)
        assert self.table.digest() == other.digest()


Slots.TestCase.settings = settings(max_examples=100, stateful_step_count=30)
TestSlots = Slots.TestCase
