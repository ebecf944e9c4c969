"""Plain weights as stacked tensors, for kernels that need no layout of their own. Legend as in base.py."""

from __future__ import annotations

import torch

from experts.kernels.base import ExpertKernel, KernelShape
from experts.model.spec import ExpertWeights


class StackedWeights:
    """All slots' weights as stacked tensors, in the layout of `ExpertWeights`."""

    def __init__(self, shape: KernelShape) -> None:
        L, S, D, I = shape.num_layers, shape.num_slots, shape.hidden_size, shape.intermediate_size

        def zeros(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=shape.dtype, device=shape.device)

        self.w13_LS2ID = zeros(L, S, 2 * I, D)
        self.w2_LSDI = zeros(L, S, D, I)
        self.b13_LS2I = zeros(L, S, 2 * I) if shape.has_bias else None
        self.b2_LSD = zeros(L, S, D) if shape.has_bias else None

    def write(self, layer: int, slot: int, weights: ExpertWeights) -> None:
        """Copy one expert into a slot, converting dtype and device."""
        self.w13_LS2ID[layer, slot].copy_(weights.w13_2ID)
        self.w2_LSDI[layer, slot].copy_(weights.w2_DI)
        if self.b13_LS2I is not None and self.b2_LSD is not None:
            assert weights.b13_2I is not None
            assert weights.b2_D is not None
            self.b13_LS2I[layer, slot].copy_(weights.b13_2I)
            self.b2_LSD[layer, slot].copy_(weights.b2_D)

    def tensors(self) -> list[torch.Tensor]:
        """All tensors; without biases there are fewer."""
        return [t for t in (self.w13_LS2ID, self.w2_LSDI, self.b13_LS2I, self.b2_LSD) if t is not None]


class StackedKernel(ExpertKernel):
    """A kernel that reads `StackedWeights`."""

    def __init__(self, shape: KernelShape) -> None:
        super().__init__(shape)
        self._weights = StackedWeights(shape)

    def _pack(self, layer: int, slot: int, weights: ExpertWeights) -> None:
        self._weights.write(layer, slot, weights)

    def _packing(self) -> str:
        return "stacked"

    def _weight_tensors(self) -> list[torch.Tensor]:
        return self._weights.tensors()
