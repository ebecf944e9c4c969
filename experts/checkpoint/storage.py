"""Finds and reads what one expert has in the stored tensors of a layout: which bytes, in which encoding.

Legend: E experts, P rows and Q columns of one expert's matrix as kernels want it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from experts.checkpoint.config import FP8_BLOCK
from experts.checkpoint.dequantize import MXFP4_BLOCK, dequantize_fp8_block, dequantize_mxfp4
from experts.checkpoint.errors import CheckpointError
from experts.checkpoint.layout import Layout, Part
from experts.checkpoint.safetensors_file import TensorEntry, TensorStore

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class ExpertRange:
    """The contiguous bytes of one tensor that belong to one expert, and their shape as stored."""

    entry: TensorEntry
    start: int
    nbytes: int
    shape: tuple[int, ...]


class ExpertStorage:
    """The stored tensors of one layout under one prefix, by layer id (decoder layer) and expert."""

    def __init__(
        self, store: TensorStore, layout: Layout, prefix: str, num_experts: int, quantization: str | None
    ) -> None:
        self.layout = layout
        self._store = store
        self.prefix = prefix
        self._num_experts = num_experts
        self._quantization = quantization
        stems = "|".join(re.escape(prefix + part.name) for part in layout.parts)
        stems = stems.replace(r"\{layer\}", r"\d+").replace(r"\{expert\}", r"\d+")
        self._owned = re.compile(f"(?:{stems})(?:_scale_inv|_blocks|_scales)?")

    def owns(self, name: str) -> bool:
        """Whether a tensor of this name is a part or a scale of a routed expert of any layer."""
        return self._owned.fullmatch(name) is not None

    def ranges(self, part: Part, shape: tuple[int, ...], layer_id: int, expert: int) -> list[ExpertRange]:
        """Where a part of `shape` (as kernels want it) lies: one range if plain, two if quantized.

        CheckpointError names a tensor that is missing or has another shape or dtype than expected.
        """
        name = self.prefix + part.name.format(layer=layer_id, expert=expert)
        if name + "_blocks" in self._store and self._quantization == "mxfp4":
            P, Q = shape
            q = Q // MXFP4_BLOCK
            if Q % MXFP4_BLOCK:
                raise CheckpointError(f"{name}_blocks: {Q} columns are not a multiple of {MXFP4_BLOCK}")
            blocks = self._range(part, name + "_blocks", (P, q, MXFP4_BLOCK // 2), expert, (torch.uint8,))
            return [blocks, self._range(part, name + "_scales", (P, q), expert, (torch.uint8,))]
        stored = shape[::-1] if part.transposed else shape
        if self._quantization != "fp8_block":
            return [self._range(part, name, stored, expert, FLOATS)]
        weight = self._range(part, name, stored, expert, (*FLOATS, torch.float8_e4m3fn))
        if weight.entry.dtype in FLOATS:  # a module that the quantization left out
            return [weight]
        if part.stack == "rows":
            raise CheckpointError(f"{name}: FP8 blocks in a tensor of stacked rows are not supported")
        blocks_shape = tuple(math.ceil(n / FP8_BLOCK) for n in stored)
        scale_dtypes = (*FLOATS, torch.float8_e8m0fnu)
        return [weight, self._range(part, name + "_scale_inv", blocks_shape, expert, scale_dtypes)]

    def _range(
        self, part: Part, name: str, shape: tuple[int, ...], expert: int, dtypes: tuple[torch.dtype, ...]
    ) -> ExpertRange:
        entry = self._store.entry(name)
        whole = {
            "none": shape,
            "leading": (self._num_experts, *shape),
            "rows": (self._num_experts * shape[0], *shape[1:]),
        }[part.stack]
        if entry.shape != whole:
            raise CheckpointError(f"{entry.file}: {name} has shape {list(entry.shape)}, expected {list(whole)}")
        if entry.dtype not in dtypes:
            expected = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise CheckpointError(
                f"{entry.file}: {name} is {entry.dtype_name}, expected {expected} "
                f"(quantization in config.json: {self._quantization or 'none'})"
            )
        nbytes = math.prod(shape) * entry.dtype.itemsize
        offset = 0 if part.stack == "none" else expert * nbytes
        return ExpertRange(entry, entry.start + offset, nbytes, shape)

    def read(self, part: Part, shape: tuple[int, ...], layer_id: int, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """A part as a tensor of `shape`, not of `dtype` yet where that would be a copy: a view of the file if plain."""
        ranges = self.ranges(part, shape, layer_id, expert)
        tensors = [self.read_range(r) for r in ranges]
        if len(tensors) == 2 and tensors[0].dtype == torch.uint8:
            return dequantize_mxfp4(tensors[0], tensors[1])
        stored = tensors[0] if len(tensors) == 1 else dequantize_fp8_block(tensors[0], tensors[1], FP8_BLOCK, dtype)
        return stored.t() if part.transposed else stored

    def read_range(self, where: ExpertRange) -> torch.Tensor:
        """The bytes of a range, as stored."""
        return self._store.read(where.entry, where.start, where.nbytes, where.shape)


def find_layout(store: TensorStore, layouts: tuple[Layout, ...], layer_id: int) -> tuple[Layout, str]:
    """The layout and prefix that the first expert of a layer is stored under, else CheckpointError."""
    for layout in layouts:
        stem = layout.parts[0].name.format(layer=layer_id, expert=0)
        for prefix in layout.prefixes:
            if prefix + stem in store or f"{prefix}{stem}_blocks" in store:
                return layout, prefix
    tried = [lo.prefixes[0] + lo.parts[0].name.format(layer=layer_id, expert=0) for lo in layouts]
    raise CheckpointError(f"{store.folder}: no routed experts found; tensor {' or '.join(tried)} is missing")
