"""Kernel made of `torch.nn.functional.grouped_mm`: two grouped matmuls over the pairs sorted by slot. CPU and CUDA.

Legend as in base.py; P pairs sorted by slot.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from experts.kernels.base import KernelShape
from experts.kernels.stacked import StackedKernel
from experts.kernels.torch.ops import gated_activation, sort_pairs

STRIDE_ALIGNMENT_BYTES = 16


class GroupedMMKernel(StackedKernel):
    """`grouped_mm` reads the slots' boundaries on the device, so the host never waits for the GPU."""

    name = "grouped_mm"

    @classmethod
    def supports(cls, shape: KernelShape) -> str | None:
        """Rows of both matrices in multiples of 16 bytes; on CUDA, bfloat16 and compute capability 8.0."""
        if not hasattr(F, "grouped_mm"):
            return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"
        for field in ("hidden_size", "intermediate_size"):
            if getattr(shape, field) * shape.dtype.itemsize % STRIDE_ALIGNMENT_BYTES:
                return f"{field} {getattr(shape, field)} in {shape.dtype} is not a multiple of 16 bytes"
        if shape.device_type == "cuda":
            if not torch.cuda.is_available():
                return "torch sees no CUDA device"
            if shape.dtype != torch.bfloat16:
                return f"on CUDA it takes bfloat16, not {shape.dtype}"
            if torch.cuda.get_device_capability(shape.device) < (8, 0):
                return "it needs compute capability 8.0"
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
        if slots_N.shape[0] == 0:
            out_MD.zero_()
            return
        shape, stacked = self.shape, self._weights
        pairs = sort_pairs(row_offsets_M1, slots_N, weights_N, shape.num_slots).to(rows_MD.device)
        x_PD = rows_MD[pairs.row_P]
        weight_P1 = pairs.weight_P[:, None]
        if shape.weight_on_input:
            x_PD = (x_PD.float() * weight_P1).to(shape.dtype)
        h_P2I = F.grouped_mm(x_PD, stacked.w13_LS2ID[layer].transpose(1, 2), offs=pairs.ends_S)
        if stacked.b13_LS2I is not None:
            h_P2I = h_P2I + stacked.b13_LS2I[layer, pairs.slot_P]
        h_PI = gated_activation(shape.activation, h_P2I)
        y_PD = F.grouped_mm(h_PI, stacked.w2_LSDI[layer].transpose(1, 2), offs=pairs.ends_S).float()
        if stacked.b2_LSD is not None:
            y_PD += stacked.b2_LSD[layer, pairs.slot_P]
        if not shape.weight_on_input:
            y_PD *= weight_P1
        acc_MD = torch.zeros(rows_MD.shape, dtype=torch.float32, device=rows_MD.device)
        out_MD.copy_(acc_MD.index_add_(0, pairs.row_P, y_PD))
