"""The slow, simple quantized kernel: dequantize an expert, then compute as the reference does."""

from __future__ import annotations

import torch

from experts.kernels.base import KernelShape
from experts.kernels.quantized import QuantizedShape, QuantizedStackKernel
from experts.kernels.torch.ops import sort_pairs
from experts.model.reference_mlp import expert_mlp


class TorchDequantKernel(QuantizedStackKernel):
    """A loop over the active slots that dequantizes each expert: every format, on the CPU, and slow.

    Legend: R rows of one slot.
    """

    name = "torch_dequant"

    @classmethod
    def supports(cls, shape: KernelShape) -> str | None:
        """The CPU only: dequantization looks values up in numpy tables."""
        if shape.device_type != "cpu":
            return f"it runs on the CPU, not on {shape.device}"
        return None if isinstance(shape, QuantizedShape) else "it takes quantized weights"

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
        shape = self.shape
        pairs = sort_pairs(row_offsets_M1, slots_N, weights_N, shape.num_slots)
        acc_MD = torch.zeros(rows_MD.shape, dtype=torch.float32)
        start = 0
        for slot, end in enumerate(pairs.ends_S.tolist()):
            if end > start:
                row_R, weight_R1 = pairs.row_P[start:end], pairs.weight_P[start:end, None]
                x_RD = rows_MD[row_R]
                if shape.weight_on_input:
                    x_RD = (x_RD.float() * weight_R1).to(shape.dtype)
                plain = self._weights.read(layer, slot).dequantize(shape.dtype)
                y_RD = expert_mlp(x_RD, plain, shape.activation).float()
                acc_MD.index_add_(0, row_R, y_RD if shape.weight_on_input else y_RD * weight_R1)
            start = end
        out_MD.copy_(acc_MD)
