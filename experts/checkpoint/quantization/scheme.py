"""What every format of a quantized matrix says of itself.

Legend: P rows, Q columns of one expert's matrix as kernels expect it; G scales of a row, each for Q / G values.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from experts.checkpoint.header import DTYPES
from experts.checkpoint.weight_format import WeightFormat

if TYPE_CHECKING:
    import torch

# As safetensors names them: checks read headers only, and do without torch.
FLOATS = ("F32", "BF16", "F16", "F64")
# Whatever any format puts beside a part's name or in its place, read or not: all of it is a routed expert's.
SUFFIXES = (
    *("_scale_inv", "_blocks", "_scales", "_packed", "_scale", "_scale_2", "_shape", "_zero_point", "_g_idx"),
    *(
        "_weight_scale",
        "_weight_scale_2",
        "_input_scale",
        "_global_scale",
        ".qweight",
        ".qzeros",
        ".scales",
        ".g_idx",
        ".input_scale",
        ".input_global_scale",
    ),
    ".input_zero_point",
)
_WEIGHT = ".weight"


def beside(name: str, suffix: str) -> str:
    """The tensor that belongs to the part `name`: its suffix is appended, or put in place of `.weight` if it has a dot.

    `x.weight` and `_scale` make `x.weight_scale`; `x.weight` and `.qweight` make `x.qweight`.
    """
    return name.removesuffix(_WEIGHT) + suffix if suffix.startswith(".") else name + suffix


@dataclass(frozen=True)
class Piece:
    """One stored tensor of a matrix. `suffix`: see `beside`; empty is the part's own name.

    `dtypes`: the usual one first. `also`: another shape that means the same. `optional`: it may be missing. `shared`:
    all experts of a layer have one, where they share tensors.
    """

    suffix: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    also: tuple[int, ...] | None = None
    optional: bool = False
    shared: bool = False


Pieces = Mapping[str, "torch.Tensor"]  # by suffix, as stored


@dataclass(frozen=True)
class Scheme(ABC):
    """A format with its settings. Objects with equal settings are equal."""

    unread_bytes: ClassVar[int] = 0
    """Bytes of small tensors beside each matrix that nobody reads here."""
    transposes: ClassVar[bool] = False
    """Whether a matrix that a family stores transposed is so in this format too."""
    only_transposed: ClassVar[bool] = False
    """Whether it has no other matrices."""

    @property
    @abstractmethod
    def name(self) -> str:
        """For programs: in statuses, and what routers and shards agree on."""

    @property
    @abstractmethod
    def text(self) -> str:
        """For people: `AWQ, 4 bits in groups of 128`."""

    def in_stack(self) -> Scheme | None:
        """The format of tensors that hold all experts of a layer, None if there is none."""
        return None

    @property
    def kept(self) -> WeightFormat | None:
        """How kernels keep it, None if weights become floats when they are loaded."""
        return None

    @abstractmethod
    def pieces(self, rows: int, columns: int) -> tuple[Piece, ...]:
        """The tensors of a matrix, the values first. If they have the part's own name, their dtype tells that a matrix
        is quantized, else their being there does.
        """

    @functools.cached_property
    def suffixes(self) -> tuple[str, ...]:
        """Those of all pieces, in their order, whatever the shape."""
        return tuple(piece.suffix for piece in self.pieces(256, 256))

    def misfit(self, rows: int, columns: int) -> str | None:
        """Why a matrix of this shape cannot be stored so, None if it can."""
        return None

    def keep(self, pieces: Pieces) -> tuple[torch.Tensor, torch.Tensor]:
        """(bytes, scales) as `QuantizedExpert` has them, of a scheme that is `kept`. ValueError names values that do
        not fit.
        """
        raise AssertionError(f"no kernel keeps {self.name}")

    def dequantize(self, pieces: Pieces, dtype: torch.dtype) -> torch.Tensor:
        """Plain floats of `dtype` [P, Q], on the CPU. ValueError names values that do not fit."""
        assert self.kept is not None
        return self.kept.dequantize(*self.keep(pieces), dtype)

    def matrix_bytes(self, rows: int, columns: int, float_bytes: int) -> int:
        """Bytes of a matrix in a file; those of scales in any float dtype are `float_bytes` each."""

        def nbytes(piece: Piece) -> int:
            anything = set(FLOATS) <= set(piece.dtypes) and piece.dtypes[0] not in ("F32", "F64")
            return math.prod(piece.shape) * (float_bytes if anything else DTYPES[piece.dtypes[0]][1])

        return self.unread_bytes + sum(nbytes(piece) for piece in self.pieces(rows, columns) if not piece.optional)


# Scales that are as wide as the model's floats.
MODEL_FLOATS = ("BF16", "F16", "F32", "F64")
# Scales that are float32 unless a tool chose another dtype.
WIDE_FLOATS = FLOATS


def whole_groups(name: str, columns: int, group: int) -> str | None:
    """Why rows of `columns` values do not divide into groups, None if they do."""
    if columns % group:
        return f"{columns} columns are not a multiple of the {group} that share a scale in {name}"
    return None


def whole_words(name: str, what: str, count: int, bits: int) -> str | None:
    """Why `count` values of so many bits do not fill int32 words, None if they do."""
    if count % (32 // bits):
        return f"{count} {what} are not a multiple of the {32 // bits} that share an int32 in {name}"
    return None
