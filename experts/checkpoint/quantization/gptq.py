"""GPTQ: words along the input dimension, scales and zeros by group, as AutoGPTQ and GPTQModel write them.

Legend: P rows (outputs), Q columns (inputs) of one expert's matrix; G groups of columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from experts.checkpoint.quantization.integers import KEPT_GROUPS
from experts.checkpoint.quantization.scheme import MODEL_FLOATS, Piece, Pieces, Scheme, whole_groups, whole_words
from experts.checkpoint.weight_format import WeightFormat

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Gptq(Scheme):
    """Symmetric GPTQ of 4 or 8 bits: `.qweight` [Q / n, P], `.scales` [G, P], `.qzeros` [G, P / n], `.g_idx` [Q].

    `group` None: one for all columns. `version` 1 stores zeros less one. `ordered` (desc_act): `.g_idx` tells each
    column's group; otherwise equal runs of columns share one.
    """

    bits: int
    group: int | None
    ordered: bool = False
    version: int = 1

    @property
    def name(self) -> str:
        return "gptq"

    @property
    def text(self) -> str:
        groups = f"groups of {self.group}" if self.group else "one group"
        return f"GPTQ, {self.bits} bits in {groups}{', sorted columns' if self.ordered else ''}"

    @property
    def kept(self) -> WeightFormat | None:
        if self.bits == 4 and not self.ordered and self.group in KEPT_GROUPS:
            return WeightFormat("int4", self.group)
        return None

    def misfit(self, rows: int, columns: int) -> str | None:
        found = whole_groups("gptq", columns, self.group) if self.group else None
        found = found or whole_words("gptq", "columns", columns, self.bits)
        return found or whole_words("gptq", "rows", rows, self.bits)

    def pieces(self, rows: int, columns: int) -> tuple[Piece, ...]:
        packing, groups = 32 // self.bits, columns // self.group if self.group else 1
        return (
            Piece(".qweight", (columns // packing, rows), ("I32",)),
            Piece(".scales", (groups, rows), MODEL_FLOATS),
            Piece(".qzeros", (groups, rows // packing), ("I32",)),
            Piece(".g_idx", (columns,), ("I32", "I64"), optional=not self.ordered),
        )

    def keep(self, pieces: Pieces) -> tuple[torch.Tensor, torch.Tensor]:
        """The words of a row one after the other: the bytes of our INT4."""
        import torch

        self._check(pieces)
        return pieces[".qweight"].t().contiguous().view(torch.uint8), pieces[".scales"].t().contiguous()

    def dequantize(self, pieces: Pieces, dtype: torch.dtype) -> torch.Tensor:
        from experts.checkpoint.quantization.packing import scaled, unpack

        if self.kept is not None:
            return super().dequantize(pieces, dtype)
        self._check(pieces)
        values_PQ = unpack(pieces[".qweight"].t(), self.bits)
        scale_PG = pieces[".scales"].t()
        return scaled(values_PQ, self._zero, scale_PG, dtype, pieces[".g_idx"] if self.ordered else None)

    @property
    def _zero(self) -> int:
        return 1 << (self.bits - 1)

    def _check(self, pieces: Pieces) -> None:
        """ValueError if zeros are not those of symmetric quantization, or a column's group is not the expected one."""
        import torch

        from experts.checkpoint.quantization.packing import check_groups, unpack

        zeros = unpack(pieces[".qzeros"], self.bits)
        stored = self._zero - (1 if self.version == 1 else 0)
        if not bool((zeros == stored).all()):
            odd = int(zeros[zeros != stored][0])
            raise ValueError(
                f"qzeros has {odd}, expected {stored} everywhere: sym is true, and the format's version is "
                f"{self.version}"
            )
        group_of_Q = pieces.get(".g_idx")
        if group_of_Q is None:
            return
        num_groups = pieces[".scales"].shape[0]
        check_groups(group_of_Q, num_groups)
        if not self.ordered:
            in_order = torch.arange(len(group_of_Q)) // (self.group or len(group_of_Q))
            if not torch.equal(group_of_Q.to(torch.int64), in_order):
                raise ValueError("g_idx has columns out of order, expected runs of a group: desc_act is false")
