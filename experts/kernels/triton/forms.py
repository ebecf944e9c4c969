"""What a Triton program computes at a time for a tile of pairs; `benchmarks.gpu.tiles` measures forms."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

HOPPER_SHARED_BYTES = 227 << 10


@dataclass(frozen=True)
class Form:
    """Sizes of one program."""

    columns: int
    depth: int  # of a step of the products
    warps: int
    stages: int  # steps in flight

    def fit(self, block: int, weights: int, itemsize: int, shared_bytes: int) -> int:
        """Stages for which shared memory suffices, with so many `weights` matrices side by side."""
        stage_bytes = itemsize * self.depth * (block + weights * self.columns)
        return max(1, min(self.stages, shared_bytes // stage_bytes))


@functools.cache
def shared_bytes(device: str) -> int:
    """Shared memory that a program may have; Hopper's where there is no GPU to ask."""
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return HOPPER_SHARED_BYTES
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)
