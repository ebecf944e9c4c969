"""Several threads fill a shard's slots: with the same result as one, at the same time, and failing cleanly."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from experts.model.spec import ExpertWeights
from experts.shard.slots import SlotTable
from placement.placement import Placement

LAYERS, EXPERTS = 2, 6


class Weights:
    """A checkpoint of distinct numbers, which notes what it is asked to fetch."""

    spec = SimpleNamespace(num_layers=LAYERS, num_experts=EXPERTS)

    def __init__(self) -> None:
        self.fetched: list[tuple[int, int]] = []

    def fetch_experts(self, wanted: list[tuple[int, int]]) -> None:
        self.fetched = list(wanted)

    def read_expert(self, layer: int, expert: int, dtype: torch.dtype) -> ExpertWeights:
        return ExpertWeights(torch.full((4, 2), float(layer)), torch.full((2, 2), float(expert)))


class Kernel:
    """Notes what it is given."""

    takes_quantized = False
    shape = SimpleNamespace(expert_bytes=1, device="cpu")

    def __init__(self, before: Callable[[int, int], Any] = lambda layer, slot: None) -> None:
        self.before = before
        self.filled: dict[tuple[int, int], float] = {}

    def begin_write(self, layer: int, slot: int) -> None:
        self.filled.pop((layer, slot), None)

    def set_slot(self, layer: int, slot: int, weights: ExpertWeights) -> None:
        self.before(layer, slot)
        self.filled[layer, slot] = float(weights.w2_DI[0, 0])


def table(kernel: Kernel, weights: Weights | None = None) -> SlotTable:
    return SlotTable(weights or Weights(), kernel, EXPERTS, torch.float32)  # type: ignore[arg-type]


def ranks(*experts: list[int]) -> Placement:
    row = [expert for rank in experts for expert in rank]
    return Placement(len(experts), 1, EXPERTS, np.array([row] * LAYERS, np.int32))


def test_only_experts_that_are_not_here_are_fetched() -> None:
    weights = Weights()
    slots = table(Kernel(), weights)
    slots.load(ranks([0, 1, 2], [3, 4, 5]), 0)
    assert weights.fetched == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    slots.load(ranks([0, 4, 2], [3, 1, 5]), 0)
    assert weights.fetched == [(0, 4), (1, 4)]


@pytest.mark.parametrize("num_threads", [1, 2, 8])
def test_threads_fill_the_slots_as_one_does(num_threads: int) -> None:
    kernel = Kernel()
    slots = table(kernel)
    order = [5, 3, 1, 0, 2, 4]
    assert slots.load(ranks(order), 0, num_threads) == LAYERS * EXPERTS
    for (layer, slot), expert in kernel.filled.items():
        assert slots.slot_of_expert_LE[layer, int(expert)] == slot
    assert len(kernel.filled) == LAYERS * EXPERTS
    alone = table(Kernel())
    alone.load(ranks(order), 0)
    assert slots.digest() == alone.digest()


def test_several_experts_are_read_at_the_same_time() -> None:
    barrier = threading.Barrier(4, timeout=60)
    slots = table(Kernel(lambda layer, slot: barrier.wait()))
    assert slots.load(ranks([0, 1, 2, 3, 4, 5]), 0, num_threads=4) == LAYERS * EXPERTS


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_slot_that_could_not_be_filled_is_free_again(num_threads: int) -> None:
    def refuse_third(layer: int, slot: int) -> None:
        if (layer, slot) == (0, 2):
            raise ValueError("damaged")

    kernel = Kernel(refuse_third)
    slots = table(kernel)
    everything = ranks([0, 1, 2, 3, 4, 5])
    with pytest.raises(ValueError, match="damaged"):
        slots.load(everything, 0, num_threads)
    assert slots.num_loaded == 2, "those before it"
    kernel.before = lambda layer, slot: None
    assert slots.load(everything, 0, num_threads) == LAYERS * EXPERTS - 2
    assert slots.num_loaded == LAYERS * EXPERTS
