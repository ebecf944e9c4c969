"""Integers of compressed-tensors: packed into int32 words (pack-quantized), or a byte each (int-quantized).

Legend: P rows, Q columns of one expert's matrix; G scales of a row. A value is `(stored - zero) * scale`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from experts.checkpoint.quantization.scheme import MODEL_FLOATS, Piece, Pieces, Scheme, whole_groups, whole_words
from experts.checkpoint.weight_format import WeightFormat

if TYPE_CHECKING:
    import torch

KEPT_GROUPS = (16, 32, 64, 128)


@dataclass(frozen=True)
class PackedIntegers(Scheme):
    """4 or 8 bits with half the range added, along the columns, the first value in a word's lowest bits.

    `group` None: one scale a row. `symmetric` False: `_zero_point` has zeros, packed along the rows, half the range
    added to them too. `ordered`: `_g_idx` tells each column's group, since columns were sorted before grouping.
    """

    bits: int
    group: int | None
    symmetric: bool = True
    ordered: bool = False
    unread_bytes: ClassVar[int] = 8  # the matrix's shape

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def text(self) -> str:
        scales = "a scale a row" if self.group is None else f"groups of {self.group}"
        zeros, order = "" if self.symmetric else " with zero points", ", sorted columns" if self.ordered else ""
        return f"INT{self.bits} in {scales}{zeros}{order}" if self.group else f"INT{self.bits} with {scales}{zeros}"

    @property
    def kept(self) -> WeightFormat | None:
        if self.bits == 4 and self.symmetric and not self.ordered and self.group in KEPT_GROUPS:
            return WeightFormat("int4", self.group)
        return None

    def misfit(self, rows: int, columns: int) -> str | None:
        name = self.name
        found = whole_groups(name, columns, self.group) if self.group else None
        found = found or whole_words(name, "columns", columns, self.bits)
        return found or (None if self.symmetric else whole_words(name, "rows", rows, self.bits))

    def pieces(self, rows: int, columns: int) -> tuple[Piece, ...]:
        groups = columns // self.group if self.group else 1
        packing = 32 // self.bits
        found = [
            Piece("_packed", (rows, columns // packing), ("I32",)),
            Piece("_scale", (rows, groups), MODEL_FLOATS, also=(rows,) if groups == 1 else None),
        ]
        if not self.symmetric:
            found.append(Piece("_zero_point", (rows // packing, groups), ("I32",)))
        if self.ordered:
            found.append(Piece("_g_idx", (columns,), ("I32", "I64")))
        return tuple(found)

    def keep(self, pieces: Pieces) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        # On a little-endian machine a word's bytes are in order.
        return pieces["_packed"].contiguous().view(torch.uint8), pieces["_scale"]

    def dequantize(self, pieces: Pieces, dtype: torch.dtype) -> torch.Tensor:
        from experts.checkpoint.quantization.packing import check_groups, scaled, unpack

        if self.kept is not None:
            return super().dequantize(pieces, dtype)
        values_PQ = unpack(pieces["_packed"], self.bits)
        scale_PG = pieces["_scale"].view(len(values_PQ), -1)
        # Half the range was added to values and to zeros, which their difference forgets.
        zeros = 1 << (self.bits - 1) if self.symmetric else unpack(pieces["_zero_point"].t(), self.bits).t()
        if self.ordered:
            check_groups(pieces["_g_idx"], scale_PG.shape[1])
        return scaled(values_PQ, zeros, scale_PG, dtype, pieces["_g_idx"] if self.ordered else None)


@dataclass(frozen=True)
class Int8(Scheme):
    """int8 under the weight's own name, with a scale for each row or for the whole matrix."""

    per_row: bool

    @property
    def name(self) -> str:
        return "int8"

    @property
    def text(self) -> str:
        return f"INT8 with a scale a {'row' if self.per_row else 'matrix'}"

    def pieces(self, rows: int, columns: int) -> tuple[Piece, ...]:
        scale = Piece("_scale", (rows, 1), MODEL_FLOATS, also=(rows,)) if self.per_row else one_number("_scale")
        return Piece("", (rows, columns), ("I8",)), scale

    def dequantize(self, pieces: Pieces, dtype: torch.dtype) -> torch.Tensor:
        from experts.checkpoint.quantization.packing import scaled

        scale_PG = pieces["_scale"].reshape(-1, 1).expand(len(pieces[""]), 1)
        return scaled(pieces[""], 0, scale_PG, dtype)


def one_number(suffix: str, dtypes: tuple[str, ...] = MODEL_FLOATS) -> Piece:
    """A tensor with one value for the whole matrix."""
    return Piece(suffix, (1,), dtypes, also=())
