"""Finds and reads one expert's bytes in the stored tensors of a layout, plain or quantized.

Legend: E experts, P rows and Q columns of one expert's matrix as kernels expect it.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experts.checkpoint.errors import CheckpointError
from experts.checkpoint.header import DTYPES, TensorEntry
from experts.checkpoint.layout import Layout, Part
from experts.checkpoint.quantization.scheme import FLOATS, SUFFIXES, Piece, Scheme, beside
from experts.checkpoint.safetensors_file import TensorStore

if TYPE_CHECKING:
    import torch

_VALUES = ("_blocks", "_packed", ".qweight")  # of tensors that hold values in place of a part's own name


@dataclass(frozen=True)
class ExpertRange:
    """The contiguous bytes of one expert in one tensor, and their shape as stored. `suffix`: see `Piece`."""

    entry: TensorEntry
    start: int
    nbytes: int
    shape: tuple[int, ...]
    suffix: str = ""


class ExpertStorage:
    """The stored tensors of one layout under one prefix, by layer id (decoder layer) and expert.

    `aside`: the id of a layer that is stored as layer 0 under another prefix, and that prefix.
    """

    def __init__(
        self,
        store: TensorStore,
        layout: Layout,
        prefix: str,
        num_experts: int,
        scheme: Scheme | None,
        aside: tuple[int, str] | None = None,
    ) -> None:
        self.layout = layout
        self.store = store
        self.prefix = prefix
        self._num_experts = num_experts
        self._scheme = scheme
        self._aside = aside
        prefixes = (prefix,) if aside is None else (prefix, aside[1])
        names = {
            beside(each + part.name, suffix) for each in prefixes for part in layout.parts for suffix in ("", *SUFFIXES)
        }
        stems = "|".join(re.escape(name) for name in sorted(names))
        stems = stems.replace(r"\{layer\}", r"\d+").replace(r"\{expert\}", r"\d+")
        self._owned = re.compile(stems)

    def owns(self, name: str) -> bool:
        """Whether the tensor `name` is a part, or a part's scale, of a routed expert of any layer."""
        return self._owned.fullmatch(name) is not None

    def is_here(self, part: Part, layer_id: int, expert: int) -> bool:
        """Whether the files of a part are in the folder. True for a part that no file has, which `ranges` names."""
        return all(self.store.is_here(name) for name in self.names(part, layer_id, expert))

    def is_quantized(self, part: Part, shape: tuple[int, ...], layer_id: int, expert: int) -> bool:
        """Whether a part is stored quantized, by its header or, if its files are not here, by the names beside it."""
        if self.is_here(part, layer_id, expert):
            return len(self.ranges(part, shape, layer_id, expert)) > 1
        return len(self.names(part, layer_id, expert)) > 1

    def names(self, part: Part, layer_id: int, expert: int) -> list[str]:
        """The tensors of a part that are read, as far as a file has them."""
        name = self._name(part, layer_id, expert)
        scheme = self._scheme_of(part)
        suffixes = ("",) if scheme is None else ("", *scheme.suffixes)
        names = dict.fromkeys(beside(name, suffix) for suffix in suffixes)
        return [found for found in names if found in self.store]

    def _scheme_of(self, part: Part) -> Scheme | None:
        """The format of a part, if it is quantized; one that has no such tensors where there is none."""
        stacked = None if self._scheme is None or part.stack != "leading" else self._scheme.in_stack()
        return self._scheme if stacked is None else stacked

    def _name(self, part: Part, layer_id: int, expert: int) -> str:
        if self._aside is not None and layer_id == self._aside[0]:
            return self._aside[1] + part.name.format(layer=0, expert=expert)
        return self.prefix + part.name.format(layer=layer_id, expert=expert)

    def ranges(self, part: Part, shape: tuple[int, ...], layer_id: int, expert: int) -> list[ExpertRange]:
        """Where a part of `shape` (as kernels expect it) is stored: one range if plain, several if quantized.

        CheckpointError names a tensor that is missing or has an unexpected shape or dtype.
        """
        name, scheme = self._name(part, layer_id, expert), self._scheme_of(part)
        stored = shape[::-1] if part.transposed else shape
        if scheme is None or not self._is_quantized(name, scheme, shape):
            return [self._range(part, Piece("", stored, FLOATS), name, expert)]
        P, Q = stored if scheme.transposes else shape
        first, *others = scheme.pieces(P, Q)
        misfit = scheme.misfit(P, Q) or _misfit_of_stack(part, scheme)
        if misfit is not None:
            raise CheckpointError(f"{beside(name, first.suffix)}: {misfit}")
        wanted = [first, *(p for p in others if not p.optional or beside(name, p.suffix) in self.store)]
        return [self._range(part, piece, name, expert) for piece in wanted]

    def _is_quantized(self, name: str, scheme: Scheme, shape: tuple[int, ...]) -> bool:
        """False for a module that the quantization leaves out: its values are floats under the part's own name."""
        if len(shape) != 2:
            return False
        values = beside(name, scheme.suffixes[0])
        if values == name:
            return self.store.entry(name).dtype_name not in FLOATS
        return values in self.store or name not in self.store

    def _range(self, part: Part, piece: Piece, name: str, expert: int) -> ExpertRange:
        name = beside(name, piece.suffix)
        entry = self.store.entry(name)
        shape = piece.shape if piece.also is None or entry.shape != piece.also else piece.also
        whole = {
            "none": shape,
            "leading": (self._num_experts, *shape),
            "rows": (self._num_experts * shape[0], *shape[1:]) if shape else shape,
        }["none" if piece.shared else part.stack]
        if entry.shape != whole:
            raise CheckpointError(f"{entry.file}: {name} has shape {list(entry.shape)}, expected {list(whole)}")
        if entry.dtype_name not in piece.dtypes:
            # Under the part's own name floats are taken, too, as not quantized.
            dtypes = piece.dtypes if piece.suffix or piece.dtypes == FLOATS else (*FLOATS, *piece.dtypes)
            expected = ", ".join(DTYPES[each][0] for each in dtypes)
            raise CheckpointError(
                f"{entry.file}: {name} is {entry.dtype_name}, expected {expected} "
                f"(quantization in config.json: {self._scheme.name if self._scheme else 'none'})"
            )
        nbytes = math.prod(shape) * DTYPES[entry.dtype_name][1]
        offset = 0 if part.stack == "none" or piece.shared else expert * nbytes
        return ExpertRange(entry, entry.start + offset, nbytes, shape, piece.suffix)

    def read(self, part: Part, shape: tuple[int, ...], layer_id: int, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """A part as a tensor of `shape`. Plain: a view of the file, in the stored dtype. Quantized: of `dtype`."""
        ranges = self.ranges(part, shape, layer_id, expert)
        scheme = self._scheme_of(part)
        if len(ranges) == 1 or scheme is None:
            stored = self.read_range(ranges[0])
            return stored.t() if part.transposed else stored
        with _named(ranges[0], self._name(part, layer_id, expert)):
            stored = scheme.dequantize(self._pieces(ranges), dtype)
        return stored.t() if part.transposed and scheme.transposes else stored

    def read_quantized(
        self, part: Part, shape: tuple[int, ...], layer_id: int, expert: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(bytes, scales) of a part, as in `QuantizedExpert`. CheckpointError if it is stored as plain floats."""
        ranges = self.ranges(part, shape, layer_id, expert)
        scheme = self._scheme_of(part)
        if len(ranges) == 1 or scheme is None:
            raise CheckpointError(f"{ranges[0].entry.file}: expert {expert} of layer {layer_id} is not quantized")
        with _named(ranges[0], self._name(part, layer_id, expert)):
            return scheme.keep(self._pieces(ranges))

    def _pieces(self, ranges: list[ExpertRange]) -> dict[str, torch.Tensor]:
        return {each.suffix: self.read_range(each) for each in ranges}

    def read_range(self, where: ExpertRange) -> torch.Tensor:
        """The bytes of a range, as stored."""
        return self.store.read(where.entry, where.start, where.nbytes, where.shape)


@contextlib.contextmanager
def _named(where: ExpertRange, name: str) -> Iterator[None]:
    """Say of which matrix the values are that do not fit."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{where.entry.file}: {name}: {error}") from error


def _misfit_of_stack(part: Part, scheme: Scheme) -> str | None:
    """`scheme` is that of the part."""
    leading = scheme.in_stack() is not None
    if scheme.only_transposed and (not part.transposed or part.interleaved):
        leading = False
    if part.stack == "rows" or (part.stack != "none" and not leading):
        kind = "stacked rows" if part.stack == "rows" else "all experts of a layer"
        return f"{scheme.text} is not supported in a tensor of {kind}"
    return None


def find_layout(store: TensorStore, layouts: tuple[Layout, ...], layer_id: int) -> tuple[Layout, str]:
    """The layout and prefix under which a layer's first expert is stored. CheckpointError if there is none."""
    for layout in layouts:
        stem = layout.parts[0].name.format(layer=layer_id, expert=0)
        for prefix in layout.prefixes:
            if any(beside(prefix + stem, suffix) in store for suffix in ("", *_VALUES)):
                return layout, prefix
    tried = [lo.prefixes[0] + lo.parts[0].name.format(layer=layer_id, expert=0) for lo in layouts]
    raise CheckpointError(f"{store.folder}: no routed experts found; tensor {' or '.join(tried)} is missing")
