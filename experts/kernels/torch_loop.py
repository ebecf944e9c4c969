"""The plainest kernel: one expert after the other with torch's matmul. Runs on every device; the others are held to it.

Legend as in base.py; R rows of one slot.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from experts.kernels.base import ExpertKernel, KernelShape
from experts.kernels.torch_ops import gated_activation, sort_pairs
from experts.spec import ExpertWeights


class StackedWeights:
    """All slots' weights as plain stacked tensors, in the layout of `ExpertWeights`."""

    def __init__(self, shape: KernelShape) -> None:
        L, S, D, I = shape.num_layers, shape.num_slots, shape.hidden_size, shape.intermediate_size

        def zeros(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=shape.dtype, device=shape.device)

        self.w13_LS2ID = zeros(L, S, 2 * I, D)
        self.w2_LSDI = zeros(L, S, D, I)
        self.b13_LS2I = zeros(L, S, 2 * I) if shape.has_bias else None
        self.b2_LSD = zeros(L, S, D) if shape.has_bias else None

    def write(self, layer: int, slot: int, weights: ExpertWeights) -> None:
        """Copy one expert in, converting dtype and device."""
        self.w13_LS2ID[layer, slot].copy_(weights.w13_2ID)
        self.w2_LSDI[layer, slot].copy_(weights.w2_DI)
        if self.b13_LS2I is not None and self.b2_LSD is not None:
            assert weights.b13_2I is not None
            assert weights.b2_D is not None
            self.b13_LS2I[layer, slot].copy_(weights.b13_2I)
            self.b2_LSD[layer, slot].copy_(weights.b2_D)

    def tensors(self) -> list[torch.Tensor]:
        """Those that exist."""
        return [t for t in (self.w13_LS2ID, self.w2_LSDI, self.b13_LS2I, self.b2_LSD) if t is not None]


class TorchLoopKernel(ExpertKernel):
    """A Python loop over the active slots, two matmuls each."""

    name = "torch_loop"

    def __init__(self, shape: KernelShape) -> None:
        super().__init__(shape)
        self._weights = StackedWeights(shape)

    @classmethod
    def supports(cls, shape: KernelShape) -> str | None:
        """Everything that torch runs."""
        if shape.device_type == "cuda" and not torch.cuda.is_available():
            return "torch sees no CUDA device"
        return None

    def _pack(self, layer: int, slot: int, weights: ExpertWeights) -> None:
        self._weights.write(layer, slot, weights)

    def _weight_tensors(self) -> list[torch.Tensor]:
        return self._weights.tensors()

    def forward(
        self,
        layer: int,
        rows_MD: torch.Tensor,
        row_offsets_M1: torch.Tensor,
        slots_N: torch.Tensor,
        weights_N: torch.Tensor,
        out_MD: torch.Tensor,
    ) -> None:
        """See `ExpertKernel.forward`."""
        self._check_call(layer, rows_MD, row_offsets_M1, slots_N, weights_N, out_MD)
        shape, stacked = self.shape, self._weights
        pairs = sort_pairs(row_offsets_M1, slots_N, weights_N, shape.num_slots)
        ends_S = pairs.ends_S.tolist()
        pairs = pairs.to(rows_MD.device)
        acc_MD = torch.zeros(rows_MD.shape, dtype=torch.float32, device=rows_MD.device)
        start = 0
        for slot, end in enumerate(ends_S):
            if end == start:
                continue
            row_R, weight_R1 = pairs.row_P[start:end], pairs.weight_P[start:end, None]
            start = end
            x_RD = rows_MD[row_R]
            if shape.weight_on_input:
                x_RD = (x_RD.float() * weight_R1).to(shape.dtype)
            b13 = None if stacked.b13_LS2I is None else stacked.b13_LS2I[layer, slot]
            b2 = None if stacked.b2_LSD is None else stacked.b2_LSD[layer, slot]
            h_R2I = F.linear(x_RD, stacked.w13_LS2ID[layer, slot], b13)
            y_RD = F.linear(gated_activation(shape.activation, h_R2I), stacked.w2_LSDI[layer, slot], b2).float()
            acc_MD.index_add_(0, row_R, y_RD if shape.weight_on_input else y_RD * weight_R1)
        out_MD.copy_(acc_MD)
