"""Small floats with few scales: FP8 with one for a matrix or for each row, and NVFP4 with two levels.

Legend: P rows, Q columns of one expert's matrix; G scales of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from experts.checkpoint.quantization.blocks import FP8_BLOCK
from experts.checkpoint.quantization.integers import one_number
from experts.checkpoint.quantization.scheme import WIDE_FLOATS, Piece, Pieces, Scheme, whole_groups
from experts.checkpoint.weight_format import WeightFormat

if TYPE_CHECKING:
    import torch

NVFP4_GROUP = 16


@dataclass(frozen=True)
class Fp8Tensor(Scheme):
    """E4M3 values and one float for the whole matrix, which kernels take as FP8 squares of equal scales.

    `stacked`: see `in_stack`.
    """

    stacked: Scheme | None = None

    def in_stack(self) -> Scheme | None:
        return self.stacked

    @property
    def name(self) -> str:
        return "fp8_tensor"

    @property
    def text(self) -> str:
        return "FP8 with a scale a matrix"

    @property
    def kept(self) -> WeightFormat:
        return WeightFormat("fp8_block", FP8_BLOCK)

    def pieces(self, rows: int, columns: int) -> tuple[Piece, ...]:
        return Piece("", (rows, columns), ("F8_E4M3",)), one_number("_scale", WIDE_FLOATS)

    def keep(self, pieces: Pieces) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        values = pieces[""]
        squares = self.kept.scale_shape(*values.shape)
        return values.view(torch.uint8), pieces["_scale"].to(torch.float32).expand(squares).contiguous()


@dataclass(frozen=True)
class Fp8Channel(Scheme):
    """E4M3 values and one float for each row."""

    @property
    def name(self) -> str:
        return "fp8_channel"

    @property
    def text(self) -> str:
        return "FP8 with a scale a row"

    def pieces(self, rows: int, columns: int) -> tuple[Piece, ...]:
        return Piece("", (rows, columns), ("F8_E4M3",)), Piece("_scale", (rows, 1), WIDE_FLOATS, also=(rows,))

    def dequantize(self, pieces: Pieces, dtype: torch.dtype) -> torch.Tensor:
        import torch

        return pieces[""].to(torch.float32).mul_(pieces["_scale"].to(torch.float32).view(-1, 1)).to(dtype)


@dataclass(frozen=True)
class Nvfp4(Scheme):
    """FP4 values, two in a byte, the low four bits first; an E4M3 scale for each 16, and a float for the matrix.

    `divides`: compressed-tensors' `_packed` and `_global_scale`, by which scales are divided; else ModelOpt's, which
    has values under the weight's own name, and `_scale_2`, by which they are multiplied. `stacked`: see `in_stack`.
    """

    divides: bool
    stacked: Scheme | None = None

    def in_stack(self) -> Scheme | None:
        return self.stacked

    @property
    def name(self) -> str:
        return "nvfp4"

    @property
    def text(self) -> str:
        return f"NVFP4 in groups of {NVFP4_GROUP}"

    def misfit(self, rows: int, columns: int) -> str | None:
        return whole_groups("nvfp4", columns, NVFP4_GROUP)

    @property
    def _values(self) -> str:
        return "_packed" if self.divides else ""

    def pieces(self, rows: int, columns: int) -> tuple[Piece, ...]:
        return (
            Piece(self._values, (rows, columns // 2), ("U8",)),
            Piece("_scale", (rows, columns // NVFP4_GROUP), ("F8_E4M3",)),
            one_number("_global_scale" if self.divides else "_scale_2", WIDE_FLOATS),
        )

    def dequantize(self, pieces: Pieces, dtype: torch.dtype) -> torch.Tensor:
        """A value times its scale is exact in float32; the matrix's scale rounds it once, then `dtype`."""
        import torch

        from experts.checkpoint.dequantize import fp4_values

        values_PQ = fp4_values(pieces[self._values])
        scale_PG = pieces["_scale"].to(torch.float32)
        values_PQ.view(*scale_PG.shape, NVFP4_GROUP).mul_(scale_PG.unsqueeze(-1))
        whole = pieces["_global_scale" if self.divides else "_scale_2"].to(torch.float32).view(())
        if not float(whole) > 0:
            raise ValueError(f"the scale of the whole matrix is {float(whole)}, expected a positive number")
        return (values_PQ.div_(whole) if self.divides else values_PQ.mul_(whole)).to(dtype)
