"""Expert weights as quantized checkpoints store them, for kernels that compute on them without dequantizing.

Legend: P rows, Q columns of one matrix; p and q the same, counted in blocks; D hidden size, I expert intermediate size.

    fp8_block  DeepSeek-V3: E4M3 bytes, one float32 scale for each square of 128 x 128
    mxfp4      gpt-oss: FP4 E2M1, two in a byte, one power of two (E8M0) for each 32 in a row
    int4       compressed-tensors, symmetric: value + 8 in four bits, two in a byte, one float scale for each group

In a byte, the low four bits come first. Gate rows come before up rows, as in `ExpertWeights`; so do their scales, each
half with its own last, partial block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from experts.model.spec import ExpertWeights

if TYPE_CHECKING:
    import torch

FormatName = Literal["fp8_block", "mxfp4", "int4"]
MXFP4_BLOCK = 32  # values that share a scale, 16 bytes


@dataclass(frozen=True)
class WeightFormat:
    """One of the formats above. `group`: number of values in a row that share a scale."""

    name: FormatName
    group: int

    def __post_init__(self) -> None:
        expected = {"fp8_block": (128,), "mxfp4": (32,), "int4": (16, 32, 64, 128)}[self.name]
        if self.group not in expected:
            raise ValueError(
                f"{self.name} with groups of {self.group}, expected one of {', '.join(map(str, expected))}"
            )

    def misfit(self, columns: int) -> str | None:
        """Why rows of `columns` values do not fit this format, None if they do."""
        if self.name != "fp8_block" and columns % self.group:
            return f"{columns} columns are not a multiple of the {self.group} that share a scale in {self.name}"
        return None

    def row_bytes(self, columns: int) -> int:
        """Bytes of the values of one row."""
        return columns if self.name == "fp8_block" else columns // 2

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the scales of one matrix."""
        p = math.ceil(rows / self.group) if self.name == "fp8_block" else rows
        return p, math.ceil(columns / self.group)

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype of the scales in kernels that compute in `dtype`."""
        import torch

        return {"fp8_block": torch.float32, "mxfp4": torch.uint8, "int4": dtype}[self.name]

    def expert_bytes(self, hidden_size: int, intermediate_size: int, dtype: torch.dtype) -> int:
        """Bytes of one expert's matrices and scales, without biases."""
        D, I = hidden_size, intermediate_size
        scales = 2 * math.prod(self.scale_shape(I, D)) + math.prod(self.scale_shape(D, I))
        return 2 * I * self.row_bytes(D) + D * self.row_bytes(I) + scales * self.scale_dtype(dtype).itemsize

    def dequantize(self, data_PB: torch.Tensor, scale_pq: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """One matrix [P, Q] as plain floats of `dtype`, on the CPU."""
        # Here, since whoever plans a placement reads the format and no weights, and does without torch.
        from experts.checkpoint.dequantize import dequantize_fp8_block, dequantize_int4, dequantize_mxfp4

        if self.name == "fp8_block":
            return dequantize_fp8_block(data_PB, scale_pq, self.group, dtype)
        if self.name == "mxfp4":
            return dequantize_mxfp4(data_PB.view(*scale_pq.shape, -1), scale_pq).to(dtype)
        return dequantize_int4(data_PB, scale_pq, dtype)


@dataclass(frozen=True)
class QuantizedExpert:
    """One expert. Data is uint8 [P, bytes of a row]; see `WeightFormat` for the scales."""

    format: WeightFormat
    w13_2IB: torch.Tensor
    w13_scale: torch.Tensor
    w2_DB: torch.Tensor
    w2_scale: torch.Tensor
    b13_2I: torch.Tensor | None = None  # float [2I]
    b2_D: torch.Tensor | None = None  # float [D]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        tensors = (self.w13_2IB, self.w13_scale, self.w2_DB, self.w2_scale, self.b13_2I, self.b2_D)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def dequantize(self, dtype: torch.dtype) -> ExpertWeights:
        """The expert as plain floats of `dtype`, on the CPU."""
        import torch

        halves = zip(self.w13_2IB.chunk(2), self.w13_scale.chunk(2), strict=True)
        return ExpertWeights(
            w13_2ID=torch.cat([self.format.dequantize(data, scale, dtype) for data, scale in halves]),
            w2_DI=self.format.dequantize(self.w2_DB, self.w2_scale, dtype),
            b13_2I=None if self.b13_2I is None else self.b13_2I.to(dtype),
            b2_D=None if self.b2_D is None else self.b2_D.to(dtype),
        )
