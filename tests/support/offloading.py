"""Offloaded kernels beside kernels that have memory for all their slots."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from experts.kernels import KERNELS, ExpertKernel, KernelShape
from experts.kernels.offload import FileBacking, Link, OffloadedKernel
from experts.kernels.pick import random_pairs, random_weights
from tests.support.kernel_cases import ACTIVATIONS

LAYERS, SLOTS = 2, 6
SHAPE = KernelShape(LAYERS, SLOTS, 40, 24, ACTIVATIONS["silu"])


def offloaded(
    name: str, places: int, shape: KernelShape = SHAPE, bytes_per_s: float | None = None, backing: Any = None
) -> OffloadedKernel:
    """With so many places in each layer; `backing` is made from the bytes of a slot's views."""
    picked = KERNELS[name](replace(shape, num_slots=places))
    view_bytes = [view.numel() for view in picked.slot_views(0, 0)]
    made = (backing or (lambda b: FileBacking(None, shape.num_layers, shape.num_slots, b)))(view_bytes)
    return OffloadedKernel(picked, shape, made, Link(bytes_per_s))


@dataclass
class Call:
    """The arguments of a forward."""

    layer: int
    rows_MD: torch.Tensor
    pairs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    @classmethod
    def random(cls, layer: int, num_rows: int, seed: int, shape: KernelShape = SHAPE, most: int = 3) -> Call:
        """Rows with up to `most` pairs each, some without any."""
        generator = torch.Generator().manual_seed(seed)
        pairs = random_pairs(num_rows, shape.num_slots, most, generator)
        return cls(layer, torch.randn(num_rows, shape.hidden_size, generator=generator).to(shape.dtype), pairs)

    def by(self, kernel: ExpertKernel) -> torch.Tensor:
        """What it computes; NaN where it writes nothing."""
        out_MD = torch.full_like(self.rows_MD, torch.nan)
        kernel.forward(self.layer, self.rows_MD, *self.pairs, out_MD)
        return out_MD

    def check(self, kernel: ExpertKernel, whole: ExpertKernel) -> None:
        """The bits are those of the kernel that has all slots in memory, where both add up in the same order."""
        expected_MD, got_MD = self.by(whole), self.by(kernel)
        if whole.name == "native":
            assert torch.equal(got_MD, expected_MD)
        else:
            torch.testing.assert_close(got_MD, expected_MD, rtol=1e-5, atol=1e-6)


def set_all(*kernels: ExpertKernel, shape: KernelShape = SHAPE, seed: int = 0) -> None:
    """The same random expert in each slot of the kernels."""
    for layer in range(shape.num_layers):
        for slot in range(shape.num_slots):
            set_one(layer, slot, seed, *kernels, shape=shape)


def set_one(layer: int, slot: int, seed: int, *kernels: ExpertKernel, shape: KernelShape = SHAPE) -> None:
    generator = torch.Generator().manual_seed(seed * 1000 + layer * 100 + slot)
    weights = random_weights(shape, generator)
    for kernel in kernels:
        kernel.set_slot(layer, slot, weights)
