"""Finds and reads one expert's bytes in the stored tensors of a layout, plain or quantized.

Legend: E experts, P rows and Q columns of one expert's matrix as kernels expect it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experts.checkpoint.errors import CheckpointError
from experts.checkpoint.header import DTYPES, TensorEntry
from experts.checkpoint.layout import Layout, Part
from experts.checkpoint.safetensors_file import TensorStore
from experts.checkpoint.weight_format import WeightFormat

if TYPE_CHECKING:
    import torch

_SUFFIX = {"mxfp4": "_blocks", "int4": "_packed"}  # of the tensor whose presence means that a part is quantized
_SUFFIXES = ("", "_scale_inv", "_blocks", "_scales", "_packed", "_scale")
# As safetensors names them: checks read headers only, and do without torch.
FLOATS = ("F32", "BF16", "F16", "F64")


@dataclass(frozen=True)
class ExpertRange:
    """The contiguous bytes of one expert in one tensor, and their shape as stored."""

    entry: TensorEntry
    start: int
    nbytes: int
    shape: tuple[int, ...]


class ExpertStorage:
    """The stored tensors of one layout under one prefix, by layer id (decoder layer) and expert."""

    def __init__(
        self, store: TensorStore, layout: Layout, prefix: str, num_experts: int, weight_format: WeightFormat | None
    ) -> None:
        self.layout = layout
        self.store = store
        self.prefix = prefix
        self._num_experts = num_experts
        self._format = weight_format
        stems = "|".join(re.escape(prefix + part.name) for part in layout.parts)
        stems = stems.replace(r"\{layer\}", r"\d+").replace(r"\{expert\}", r"\d+")
        self._owned = re.compile(f"(?:{stems})(?:_scale_inv|_blocks|_scales|_packed|_scale|_shape)?")

    def owns(self, name: str) -> bool:
        """Whether the tensor `name` is a part, or a part's scale, of a routed expert of any layer."""
        return self._owned.fullmatch(name) is not None

    def is_here(self, part: Part, layer_id: int, expert: int) -> bool:
        """Whether the files of a part are in the folder. True for a part that no file has, which `ranges` names."""
        return all(self.store.is_here(name) for name in self.names(part, layer_id, expert))

    def is_quantized(self, part: Part, shape: tuple[int, ...], layer_id: int, expert: int) -> bool:
        """Whether a part is stored quantized, by its header or, if its files are not here, by the names beside it."""
        if self.is_here(part, layer_id, expert):
            return len(self.ranges(part, shape, layer_id, expert)) == 2
        return len(self.names(part, layer_id, expert)) > 1

    def names(self, part: Part, layer_id: int, expert: int) -> list[str]:
        """The tensors of a part, as far as a file has them."""
        name = self.prefix + part.name.format(layer=layer_id, expert=expert)
        return [name + suffix for suffix in _SUFFIXES if name + suffix in self.store]

    def ranges(self, part: Part, shape: tuple[int, ...], layer_id: int, expert: int) -> list[ExpertRange]:
        """Where a part of `shape` (as kernels expect it) is stored: one range if plain, two if quantized.

        CheckpointError names a tensor that is missing or has an unexpected shape or dtype.
        """
        name, form = self.prefix + part.name.format(layer=layer_id, expert=expert), self._format
        stored = shape[::-1] if part.transposed else shape
        if form is not None and form.name != "fp8_block" and name + _SUFFIX[form.name] in self.store:
            misfit = form.misfit(shape[-1])
            if misfit is not None:
                raise CheckpointError(f"{name}{_SUFFIX[form.name]}: {misfit}")
            P, Q = shape
            scales = form.scale_shape(P, Q)
            if form.name == "mxfp4":
                blocks = self._range(part, name + "_blocks", (*scales, form.group // 2), expert, ("U8",))
                return [blocks, self._range(part, name + "_scales", scales, expert, ("U8",))]
            packed = self._range(part, name + "_packed", (P, Q // 8), expert, ("I32",))
            return [packed, self._range(part, name + "_scale", scales, expert, FLOATS)]
        if form is None or form.name != "fp8_block":
            return [self._range(part, name, stored, expert, FLOATS)]
        weight = self._range(part, name, stored, expert, (*FLOATS, "F8_E4M3"))
        if weight.entry.dtype_name in FLOATS:  # a module that was not quantized
            return [weight]
        if part.stack == "rows":
            raise CheckpointError(f"{name}: FP8 blocks are not supported in a tensor of stacked rows")
        scale_dtypes = (*FLOATS, "F8_E8M0")
        return [weight, self._range(part, name + "_scale_inv", form.scale_shape(*stored), expert, scale_dtypes)]

    def _range(
        self, part: Part, name: str, shape: tuple[int, ...], expert: int, dtypes: tuple[str, ...]
    ) -> ExpertRange:
        entry = self.store.entry(name)
        whole = {
            "none": shape,
            "leading": (self._num_experts, *shape),
            "rows": (self._num_experts * shape[0], *shape[1:]),
        }[part.stack]
        if entry.shape != whole:
            raise CheckpointError(f"{entry.file}: {name} has shape {list(entry.shape)}, expected {list(whole)}")
        if entry.dtype_name not in dtypes:
            expected = ", ".join(DTYPES[name][0] for name in dtypes)
            raise CheckpointError(
                f"{entry.file}: {name} is {entry.dtype_name}, expected {expected} "
                f"(quantization in config.json: {self._format.name if self._format else 'none'})"
            )
        nbytes = math.prod(shape) * DTYPES[entry.dtype_name][1]
        offset = 0 if part.stack == "none" else expert * nbytes
        return ExpertRange(entry, entry.start + offset, nbytes, shape)

    def read(self, part: Part, shape: tuple[int, ...], layer_id: int, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """A part as a tensor of `shape`. Plain: a view of the file, in the stored dtype. Quantized: of `dtype`."""
        ranges = self.ranges(part, shape, layer_id, expert)
        if len(ranges) == 2:
            assert self._format is not None
            data_PB, scale = self._quantized(ranges)
            stored = self._format.dequantize(data_PB, scale, dtype)
            # Only FP8 squares can be stored transposed.
            return stored.t() if part.transposed and self._format.name == "fp8_block" else stored
        stored = self.read_range(ranges[0])
        return stored.t() if part.transposed else stored

    def read_quantized(
        self, part: Part, shape: tuple[int, ...], layer_id: int, expert: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(bytes, scales) of a part, as in `QuantizedExpert`. CheckpointError if it is stored as plain floats."""
        ranges = self.ranges(part, shape, layer_id, expert)
        if len(ranges) != 2:
            raise CheckpointError(f"{ranges[0].entry.file}: expert {expert} of layer {layer_id} is not quantized")
        return self._quantized(ranges)

    def _quantized(self, ranges: list[ExpertRange]) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        data, scale = (self.read_range(r) for r in ranges)
        # An int32 holds eight values, the first in the lowest bits: on a little-endian machine, bytes in order.
        return data.reshape(len(data), -1).view(torch.uint8), scale

    def read_range(self, where: ExpertRange) -> torch.Tensor:
        """The bytes of a range, as stored."""
        return self.store.read(where.entry, where.start, where.nbytes, where.shape)


def find_layout(store: TensorStore, layouts: tuple[Layout, ...], layer_id: int) -> tuple[Layout, str]:
    """The layout and prefix under which a layer's first expert is stored. CheckpointError if there is none."""
    for layout in layouts:
        stem = layout.parts[0].name.format(layer=layer_id, expert=0)
        for prefix in layout.prefixes:
            if any(f"{prefix}{stem}{suffix}" in store for suffix in ("", *_SUFFIX.values())):
                return layout, prefix
    tried = [lo.prefixes[0] + lo.parts[0].name.format(layer=layer_id, expert=0) for lo in layouts]
    raise CheckpointError(f"{store.folder}: no routed experts found; tensor {' or '.join(tried)} is missing")
