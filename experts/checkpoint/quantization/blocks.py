"""Formats that kernels take as they are stored: FP8 in squares, and MXFP4."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from experts.checkpoint.quantization.scheme import FLOATS, Piece, Pieces, Scheme
from experts.checkpoint.weight_format import MXFP4_BLOCK, WeightFormat

if TYPE_CHECKING:
    import torch

FP8_BLOCK = 128


@dataclass(frozen=True)
class Fp8Block(Scheme):
    """E4M3 values, a scale for each square of 128 x 128 beside them: `_scale_inv` of DeepSeek-V3, `_scale` of
    compressed-tensors. Both multiply.
    """

    scale: str = "_scale_inv"
    transposes: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return "fp8_block"

    @property
    def text(self) -> str:
        return f"FP8 in squares of {FP8_BLOCK} x {FP8_BLOCK}"

    def in_stack(self) -> Scheme:
        return self

    @property
    def kept(self) -> WeightFormat:
        return WeightFormat("fp8_block", FP8_BLOCK)

    def pieces(self, rows: int, columns: int) -> tuple[Piece, ...]:
        squares = (math.ceil(rows / FP8_BLOCK), math.ceil(columns / FP8_BLOCK))
        return Piece("", (rows, columns), ("F8_E4M3",)), Piece(self.scale, squares, (*FLOATS, "F8_E8M0"))

    def keep(self, pieces: Pieces) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        return pieces[""].view(torch.uint8), pieces[self.scale]


@dataclass(frozen=True)
class Mxfp4(Scheme):
    """FP4 values and a power of two for each 32: gpt-oss's `_blocks` and `_scales`, where a group's bytes have an axis
    of their own, or `_packed` and `_scale` of compressed-tensors (mxfp4-pack-quantized), where they have none.
    """

    packed: bool = False

    @property
    def name(self) -> str:
        return "mxfp4"

    @property
    def text(self) -> str:
        return f"MXFP4 in groups of {MXFP4_BLOCK}"

    def in_stack(self) -> Scheme:
        return self

    @property
    def kept(self) -> WeightFormat:
        return WeightFormat("mxfp4", MXFP4_BLOCK)

    def misfit(self, rows: int, columns: int) -> str | None:
        return self.kept.misfit(columns)

    def pieces(self, rows: int, columns: int) -> tuple[Piece, ...]:
        scales = self.kept.scale_shape(rows, columns)
        if self.packed:
            return Piece("_packed", (rows, columns // 2), ("U8",)), Piece("_scale", scales, ("U8",))
        return Piece("_blocks", (*scales, MXFP4_BLOCK // 2), ("U8",)), Piece("_scales", scales, ("U8",))

    def keep(self, pieces: Pieces) -> tuple[torch.Tensor, torch.Tensor]:
        data, scale = pieces.values()
        return data.reshape(len(data), -1), scale
