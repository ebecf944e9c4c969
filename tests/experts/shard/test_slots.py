"""The slot table alone, with a kernel that only notes what it is given and a clock that a test moves.

L MoE layers, E logical experts, s slots of this shard in a layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experts.shard import slots as slots_module
from placement.placement import Placement
from tests.support.noted_slots import EVERYTHING, EXPERTS, HALVES, LAYERS, NotingKernel, Weights, placement, table


class Clock:
    """The time that the slot table sees."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        self.looks = 0
        self.asleep: Callable[[], None] = lambda: None
        monkeypatch.setattr(slots_module, "time", SimpleNamespace(monotonic=self.look, sleep=self.sleep))

    def look(self) -> float:
        self.looks += 1
        assert self.looks < 1000, "it waits without letting time pass"
        return self.now_s

    def sleep(self, seconds: float) -> None:
        assert 0 < seconds < 0.01, "a request lasts milliseconds"
        self.now_s += 1.0
        self.asleep()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


# --- what is loaded, and where -------------------------------------------------------------------------------------


def test_an_empty_table_holds_nothing() -> None:
    slots = table()
    assert slots.slot_of_expert_LE.tolist() == [[-1] * EXPERTS] * LAYERS
    assert slots.slot_of_expert_LE.dtype == np.int32
    assert (slots.num_loaded, slots.loaded_bytes, slots.num_slots) == (0, 0, 3)


def test_a_rank_gets_its_experts_in_every_layer_and_no_others() -> None:
    kernel, weights = NotingKernel(), Weights()
    slots = table(kernel=kernel, weights=weights)
    assert slots.load(HALVES, 1) == 6
    assert slots.slot_of_expert_LE.tolist() == [[-1, -1, -1, 0, 1, 2]] * LAYERS
    assert weights.read == [("floats", layer, expert) for layer in range(LAYERS) for expert in (3, 4, 5)]
    assert weights.dtypes == {torch.float32}
    assert kernel.set == [(layer, slot) for layer in range(LAYERS) for slot in range(3)]
    assert (slots.num_loaded, slots.loaded_bytes) == (6, 6_000_000)
    assert slots.load(HALVES, 1) == 0, "nothing is loaded twice"
    assert len(kernel.set) == 6


def test_layers_may_hold_different_experts_in_different_slots() -> None:
    slots = table()
    slots.load(Placement(2, 1, EXPERTS, np.array([[5, 0, 3, 1, 2, 4], [1, 2, 4, 0, 3, 5]])), 0)
    assert slots.slot_of_expert_LE.tolist() == [[0, -1, -1, 1, -1, 2], [-1, 0, 1, -1, 2, -1]]


def test_empty_places_of_a_placement_and_repeats_take_no_slot() -> None:
    weights = Weights()
    slots = table(weights=weights)
    assert slots.load(placement([0, -1, 0], [1, 2, 3], [4, 5, -1]), 0) == 2
    assert slots.slot_of_expert_LE.tolist() == [[0, -1, -1, -1, -1, -1]] * LAYERS
    assert slots.load(placement([0, 1, 2], [3, 4, 5], [-1, -1, -1]), 0) == 4, "into the slots that stayed empty"
    assert slots.slot_of_expert_LE.tolist() == [[0, 1, 2, -1, -1, -1]] * LAYERS


def test_slots_that_do_not_suffice_are_named() -> None:
    slots = table(num_slots=2)
    with pytest.raises(
        ValueError, match=r"layer 0 has no free slot for expert 2: all 2 are in use; release .*slots_per"
    ):
        slots.load(HALVES, 0)
    assert slots.release([(0, 0), (0, 1), (1, 0), (1, 1)]) == slots.num_loaded + 2
    assert slots.num_free == 2 * LAYERS


def test_held_is_the_table_by_slot() -> None:
    slots = table(num_slots=4)
    slots.load(Placement(2, 1, EXPERTS, np.array([[5, 0, 3, 1, 2, 4], [1, 2, 4, 0, 3, 5]])), 0)
    slots.release([(1, 2)])
    reserved = slots.reserve(1, 5)
    held_Ls = slots.held_Ls()
    assert held_Ls.dtype == np.int32
    assert held_Ls.tolist() == [[0, 3, 5, -1], [1, -1, 4, -1]]
    assert reserved == 1
    assert slots.num_free == 2


@pytest.mark.parametrize(("layers", "experts"), [(1, 6), (3, 6), (2, 4), (2, 8)])
def test_a_placement_of_another_model_is_refused_before_anything_is_read(layers: int, experts: int) -> None:
    weights = Weights()
    text = f"the placement is for {layers} layers of {experts} experts, the checkpoint for 2 of 6"
    with pytest.raises(ValueError, match=text):
        table(weights=weights).load(Placement.linear(layers, experts, 2), 0)
    assert weights.read == []


def test_kernels_of_quantized_weights_get_them_as_they_are_stored() -> None:
    weights = Weights()
    slots = table(kernel=NotingKernel(takes_quantized=True), weights=weights)
    slots.load(HALVES, 0)
    assert {form for form, *_ in weights.read} == {"quantized"}


# --- while requests are served ------------------------------------------------------------------------------------


def test_a_table_that_somebody_reads_is_never_written_to() -> None:
    slots = table()
    tables = [slots.slot_of_expert_LE]
    slots.load(HALVES, 0)
    tables.append(slots.slot_of_expert_LE)
    slots.release([(0, 0)])
    tables.append(slots.slot_of_expert_LE)
    kernel_saw: list[int] = []
    slots.kernel.before_set = lambda layer, slot: kernel_saw.append(int(slots.slot_of_expert_LE[0, 5]))  # type: ignore[attr-defined]
    slot = slots.reserve(0, 5)
    assert slot == 0
    slots.publish(0, 5, slot, slots.install(0, 5, slot))
    assert kernel_saw == [-1], "nobody finds what is still being written"
    assert [t[0].tolist() for t in tables] == [[-1] * 6, [0, 1, 2, -1, -1, -1], [-1, 1, 2, -1, -1, -1]]
    assert slots.slot_of_expert_LE[0].tolist() == [-1, 1, 2, -1, -1, 0]


def test_a_released_slot_is_free_only_after_the_request_that_may_use_it(clock: Clock) -> None:
    slots = table()
    slots.load(HALVES, 0)
    slept = 0

    def end() -> None:
        nonlocal slept
        slept += 1
        assert slots.slot_of_expert_LE[0, 0] == -1, "no later request finds the old expert"
        if slept == 3:
            slots.end_request()

    clock.asleep = end
    slots.begin_request()
    assert slots.release([(0, 0)]) == 1
    assert (slots.num_free, slots.num_loaded) == (0, 5)
    assert slots.reserve(0, 5) == 0
    assert slept == 3


def test_an_empty_slot_is_filled_while_a_request_runs(clock: Clock) -> None:
    slots = table()
    slots.begin_request()
    assert slots.load(HALVES, 0) == 6
    assert clock.now_s == 100.0, "nobody waited"


def test_the_request_after_that_one_is_not_waited_for(clock: Clock) -> None:
    slots = table()
    slots.load(HALVES, 0)
    slots.begin_request()
    slots.release(EVERYTHING)
    slots.end_request()
    slots.begin_request()
    assert slots.num_free == 6
    assert slots.reserve(1, 4) == 0


def test_a_request_that_never_ends_loses_no_slot(clock: Clock) -> None:
    slots = table()
    slots.load(HALVES, 0)
    slots.begin_request()
    slots.release([(0, 1)])
    with pytest.raises(TimeoutError, match=r"a request has computed for 60 s, so no slot of layer 0 is free"):
        slots.reserve(0, 5)
    assert clock.now_s == 161.0
    slots.end_request()
    assert slots.reserve(0, 5) == 1


def test_a_wait_for_a_slot_can_be_called_off(clock: Clock) -> None:
    slots = table()
    slots.load(HALVES, 0)
    slots.begin_request()
    slots.release([(0, 1)])
    with pytest.raises(ValueError, match="cancelled"):
        slots.reserve(0, 5, lambda: clock.now_s > 102)


def test_what_could_not_be_filled_takes_no_slot() -> None:
    slots = table()

    def out_of_memory(layer: int, slot: int) -> None:
        if layer == 1:
            raise RuntimeError("not enough memory")

    slots.kernel.before_set = out_of_memory  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="not enough memory"):
        slots.load(HALVES, 0)
    assert slots.slot_of_expert_LE.tolist() == [[0, 1, 2, -1, -1, -1], [-1] * 6]
    assert slots.num_free == 3
    slots.kernel.before_set = lambda layer, slot: None  # type: ignore[attr-defined]
    assert slots.load(HALVES, 0) == 3


def test_only_what_is_there_is_released_and_once() -> None:
    slots = table()
    slots.load(HALVES, 0)
    assert slots.release([(0, 0), (0, 0), (0, 5), (-1, 0), (LAYERS, 0), (0, -1), (0, EXPERTS), (1, 2)]) == 2
    assert slots.release([(0, 0)]) == 0
    assert slots.kernel.emptied == [(0, 0), (1, 2)], "a kernel computes with neither"  # type: ignore[attr-defined]


@pytest.mark.parametrize(("layer", "expert"), [(-1, 0), (LAYERS, 0), (0, -1), (0, EXPERTS)])
def test_an_expert_of_no_such_model_gets_no_slot(layer: int, expert: int) -> None:
    slots = table()
    with pytest.raises(ValueError, match=f"expert {expert} of layer {layer}, this model has 2 layers of 6 experts"):
        slots.reserve(layer, expert)
    assert slots.lend(layer, expert) is None
    assert slots.num_free == 6


def test_who_reads_a_slot_learns_that_it_was_released_meanwhile() -> None:
    slots = table()
    assert slots.lend(0, 0) is None
    slots.load(HALVES, 0)
    lent, other = slots.lend(0, 0), slots.lend(0, 1)
    assert lent is not None
    assert other is not None

    def unchanged(loan: tuple[int, bytes, np.ndarray, int]) -> bool:
        return int(loan[2][0]) == loan[3]

    assert (lent[0], unchanged(lent), unchanged(other)) == (0, True, True)
    slots.release([(0, 0)])
    slots.publish(0, 0, slots.reserve(0, 0), lent[1])  # type: ignore[arg-type]
    assert (unchanged(lent), unchanged(other)) == (False, True), "even if the same expert is back in the same slot"


# --- the log ------------------------------------------------------------------------------------------------------


def test_progress_is_told_every_two_seconds_and_at_the_end(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    kernel = NotingKernel()

    def wait(layer: int, slot: int) -> None:
        clock.now_s += 1.0

    kernel.before_set = wait
    with caplog.at_level(logging.INFO, slots_module.__name__):
        table(6, kernel).load(placement([0, 1, 2, 3], [4, 5, -1, -1]), 0)
    # (rank, experts so far, experts in all, MB so far, MB/s)
    assert [record.args for record in caplog.records] == [
        (0, 3, 8, 3.0, 1.0),
        (0, 6, 8, 6.0, 1.0),
        (0, 8, 8, 8.0, 1.0),
    ]


def test_a_load_that_takes_no_time_is_told_as_one(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, slots_module.__name__):
        table().load(HALVES, 1)
    assert [record.args[:3] for record in caplog.records] == [(1, 6, 6)]  # type: ignore[index]
