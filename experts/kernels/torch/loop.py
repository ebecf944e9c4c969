"""The simplest kernel: one expert after another with torch's matmul, on every device.

Legend as in base.py; R rows of one slot.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from experts.kernels.base import KernelShape
from experts.kernels.stacked import StackedKernel
from experts.kernels.torch.ops import gated_activation, sort_pairs


class TorchLoopKernel(StackedKernel):
    """A Python loop over the active slots, two matmuls each."""

    name = "torch_loop"

    @classmethod
    def supports(cls, shape: KernelShape) -> str | None:
        """Everything that torch supports."""
        if shape.device_type == "cuda" and not torch.cuda.is_available():
            return "torch sees no CUDA device"
        return None

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
