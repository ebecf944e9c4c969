"""ModelOpt's FP8 and NVFP4 where one tensor holds all experts of a layer, as for Llama 4: every matrix is transposed,
and all experts of a layer share the float of the whole matrix.

Legend: P rows, Q columns of one expert's matrix as kernels expect it, stored as [Q, P]; G scales of one of P.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from experts.checkpoint.quantization.floats import NVFP4_GROUP, Nvfp4
from experts.checkpoint.quantization.scheme import WIDE_FLOATS, Piece, Pieces, Scheme, whole_groups

if TYPE_CHECKING:
    import torch

_SCALE, _SCALE_2 = "_weight_scale", "_weight_scale_2"


def _one_for_all(suffix: str) -> Piece:
    return Piece(suffix, (), WIDE_FLOATS, also=(1,), shared=True)


@dataclass(frozen=True)
class StackedFp8(Scheme):
    """E4M3 values and one float. Rows and columns are those stored."""

    transposes: ClassVar[bool] = True
    only_transposed: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return "fp8_tensor"

    @property
    def text(self) -> str:
        return "FP8 with a scale a layer"

    def in_stack(self) -> Scheme:
        return self

    def pieces(self, rows: int, columns: int) -> tuple[Piece, ...]:
        return Piece("", (rows, columns), ("F8_E4M3",)), _one_for_all(_SCALE)

    def dequantize(self, pieces: Pieces, dtype: torch.dtype) -> torch.Tensor:
        import torch

        return pieces[""].to(torch.float32).mul_(pieces[_SCALE].to(torch.float32).view(())).to(dtype)


@dataclass(frozen=True)
class StackedNvfp4(Scheme):
    """FP4 values, two rows in a byte, the first in its low bits; an E4M3 scale for 16 rows of a column; one float."""

    transposes: ClassVar[bool] = True
    only_transposed: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return "nvfp4"

    @property
    def text(self) -> str:
        return f"NVFP4 in groups of {NVFP4_GROUP}"

    def misfit(self, rows: int, columns: int) -> str | None:
        return whole_groups("nvfp4", rows, NVFP4_GROUP)

    def in_stack(self) -> Scheme:
        return self

    def pieces(self, rows: int, columns: int) -> tuple[Piece, ...]:
        return (
            Piece("", (rows // 2, columns), ("U8",)),
            Piece(_SCALE, (rows // NVFP4_GROUP, columns), ("F8_E4M3",)),
            _one_for_all(_SCALE_2),
        )

    def dequantize(self, pieces: Pieces, dtype: torch.dtype) -> torch.Tensor:
        data_PB, scale_PG = pieces[""].t().contiguous(), pieces[_SCALE].t()
        turned = {"": data_PB, "_scale": scale_PG, "_scale_2": pieces[_SCALE_2]}
        return Nvfp4(divides=False).dequantize(turned, dtype).t()
