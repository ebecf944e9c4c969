"""A slot table over a checkpoint in memory and a kernel that only notes what it is given.

L MoE layers, E logical experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from experts.checkpoint.weight_format import QuantizedExpert, WeightFormat
from experts.model.spec import ExpertWeights
from experts.shard.slots import SlotTable
from placement.placement import Placement

LAYERS, EXPERTS, HIDDEN, INNER = 2, 6, 4, 5


class Weights:
    """A checkpoint in memory, of distinct numbers; `changed` alters one value of one tensor."""

    def __init__(self, changed: dict[tuple[int, int], tuple[str, int]] | None = None) -> None:
        self.spec = SimpleNamespace(num_layers=LAYERS, num_experts=EXPERTS)
        self.changed = changed or {}
        self.read: list[tuple[str, int, int]] = []
        self.dtypes: set[torch.dtype] = set()
        self.fetched: list[tuple[int, int]] = []

    def fetch_experts(self, wanted: list[tuple[int, int]]) -> None:
        self.fetched = list(wanted)

    def read_expert(self, layer: int, expert: int, dtype: torch.dtype) -> ExpertWeights:
        self.read.append(("floats", layer, expert))
        self.dtypes.add(dtype)
        first = torch.arange(2 * INNER * HIDDEN, dtype=dtype).reshape(2 * INNER, HIDDEN)
        last = -torch.arange(HIDDEN * INNER, dtype=dtype).reshape(HIDDEN, INNER)
        for tensor, name in ((first, "w13"), (last, "w2")):
            if self.changed.get((layer, expert), ("",))[0] == name:
                tensor.view(-1)[self.changed[layer, expert][1]] += 0.5
        return ExpertWeights(w13_2ID=first, w2_DI=last, b13_2I=None, b2_D=None)

    def read_quantized(self, layer: int, expert: int) -> QuantizedExpert:
        self.read.append(("quantized", layer, expert))
        first = torch.arange(32, dtype=torch.uint8).reshape(4, 8)
        last = torch.arange(32, 64, dtype=torch.uint8).reshape(4, 8)
        for tensor, name in ((first, "w13"), (last, "w2")):
            if self.changed.get((layer, expert), ("",))[0] == name:
                tensor.view(-1)[self.changed[layer, expert][1]] += 1
        scale = torch.ones(4, 1)
        return QuantizedExpert(WeightFormat("int4", 16), first, scale, last, scale)


@dataclass
class NotingKernel:
    """What stands in each slot, by (layer, slot)."""

    takes_quantized: bool = False
    shape: Any = field(default_factory=lambda: SimpleNamespace(expert_bytes=1_000_000, device="cpu"))
    set: list[tuple[int, int]] = field(default_factory=list)
    emptied: list[tuple[int, int]] = field(default_factory=list)
    before_set: Callable[[int, int], None] = lambda layer, slot: None

    def begin_write(self, layer: int, slot: int) -> None:
        self.emptied.append((layer, slot))

    def set_slot(self, layer: int, slot: int, weights: Any) -> None:
        self.before_set(layer, slot)
        self.set.append((layer, slot))


def table(num_slots: int = 3, kernel: NotingKernel | None = None, weights: Weights | None = None) -> SlotTable:
    return SlotTable(weights or Weights(), kernel or NotingKernel(), num_slots, torch.float32)  # type: ignore[arg-type]


def placement(*ranks: list[int]) -> Placement:
    """Ranks with the same experts in both layers; -1 is an empty slot."""
    row = [expert for rank in ranks for expert in rank]
    return Placement(len(ranks), 1, EXPERTS, np.array([row] * LAYERS))


HALVES = placement([0, 1, 2], [3, 4, 5])
EVERYTHING = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
