"""AWQ of AutoAWQ's version `gemm`: words along the output dimension, nibbles interleaved, a zero for each group.

Legend: P rows (outputs), Q columns (inputs) of one expert's matrix; G groups of columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from experts.checkpoint.quantization.scheme import MODEL_FLOATS, Piece, Pieces, Scheme, whole_groups, whole_words

if TYPE_CHECKING:
    import torch

BITS = 4
# Nibble i of a word, the lowest first, is output ORDER[i] of the word's eight.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Awq(Scheme):
    """`.qweight` [Q, P / 8], `.qzeros` [G, P / 8], `.scales` [G, P]; `group` None: one for all columns."""

    group: int | None

    @property
    def name(self) -> str:
        return "awq"

    @property
    def text(self) -> str:
        return f"AWQ, {BITS} bits in {f'groups of {self.group}' if self.group else 'one group'} with zero points"

    def misfit(self, rows: int, columns: int) -> str | None:
        found = whole_groups("awq", columns, self.group) if self.group else None
        return found or whole_words("awq", "rows", rows, BITS)

    def pieces(self, rows: int, columns: int) -> tuple[Piece, ...]:
        groups = columns // self.group if self.group else 1
        return (
            Piece(".qweight", (columns, rows // 8), ("I32",)),
            Piece(".qzeros", (groups, rows // 8), ("I32",)),
            Piece(".scales", (groups, rows), MODEL_FLOATS),
        )

    def dequantize(self, pieces: Pieces, dtype: torch.dtype) -> torch.Tensor:
        from experts.checkpoint.quantization.packing import scaled

        values_PQ, zeros_PG = (_outputs_first(pieces[name]) for name in (".qweight", ".qzeros"))
        return scaled(values_PQ, zeros_PG, pieces[".scales"].t(), dtype)


def _outputs_first(words: torch.Tensor) -> torch.Tensor:
    """int32 [n, P / 8] to uint8 [P, n], outputs in their order."""
    import torch

    from experts.checkpoint.quantization.packing import unpack

    nibbles = unpack(words, BITS).view(len(words), -1, 8)
    ordered = torch.empty_like(nibbles)
    ordered[..., list(ORDER)] = nibbles
    return ordered.flatten(1).t().contiguous()
