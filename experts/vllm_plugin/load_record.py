"""Whether a model got all of its weights: notes, while vLLM loads, which elements are written and from which tensors.

vLLM's own check passes over every layer that has a quantization method, plain linear ones too, and takes a fused
parameter for loaded once one of its parts is. Its loaders take the front of a tensor that is too large.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Values that mean nothing without a scale. (F8_E8M0 holds scales themselves.)
_SCALED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8)
_Region = tuple[int, tuple[int, ...], tuple[int, ...]]  # offset in the storage, sizes, strides


@dataclass
class _Offered:
    """A tensor of the checkpoint, and what of it was copied into a parameter."""

    name: str
    where: str
    shape: tuple[int, ...]
    taken: set[_Region] = field(default_factory=set)
    cast_from: str = ""
    """Its dtype, if values without their scale were taken for plain numbers."""


@dataclass
class _Filled:
    """A parameter, and what of it was written."""

    name: str
    parameter: torch.nn.Parameter
    storage: int
    written: set[_Region] = field(default_factory=set)
    sources: set[str] = field(default_factory=set)


class LoadRecord(TorchDispatchMode):
    """A context within which a model's weights are loaded; `problems` then says what is missing.

    A dispatch mode sees each operator once, so that it costs microseconds a tensor and reads no data.
    """

    def __init__(self, model: torch.nn.Module, exempt: Iterable[str] = ()) -> None:
        """`exempt`: names of parameters that need not come from the checkpoint."""
        super().__init__()
        skipped = set(exempt)
        self._filled = {
            _storage_of(parameter): _Filled(name, parameter, _storage_of(parameter))
            for name, parameter in model.named_parameters()
            if name not in skipped and parameter.numel() > 0 and not parameter.is_meta
        }
        self._offered: dict[int, _Offered] = {}
        self._all_offered: list[_Offered] = []

    def offer(self, name: str, where: str, tensor: torch.Tensor) -> None:
        """Note a tensor that is handed to vLLM; `where` is the file that it comes from."""
        offered = _Offered(name, where, tuple(tensor.shape))
        self._offered[_storage_of(tensor)] = offered
        self._all_offered.append(offered)

    @property
    def last(self) -> str:
        """The tensor that was handed over last, and its file; empty before the first."""
        if not self._all_offered:
            return ""
        offered = self._all_offered[-1]
        return f"{offered.where}: {offered.name} (shape {list(offered.shape)})"

    def taken(self) -> dict[str, set[_Region]]:
        """Which parts of each tensor were taken, by name."""
        return {offered.name: offered.taken for offered in self._all_offered}

    def add_taken(self, elsewhere: dict[str, set[_Region]]) -> None:
        """What another worker of a tensor-parallel engine took: a tensor must fit the parameters of all together."""
        for offered in self._all_offered:
            offered.taken |= elsewhere.get(offered.name, set())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, torch.Tensor):
                filled = self._filled.get(_storage_of(value))
                if filled is not None:
                    filled.written.add(_region_of(value))
                    self._note_sources(filled, args)
        return result

    def _note_sources(self, filled: _Filled, args: Any) -> None:
        for source in args[1:]:
            if isinstance(source, torch.Tensor):
                offered = self._offered.get(_storage_of(source))
                if offered is not None:
                    offered.taken.add(_region_of(source))
                    filled.sources.add(offered.name)
                    if source.dtype in _SCALED and filled.parameter.dtype.itemsize > 1:
                        offered.cast_from = str(source.dtype).removeprefix("torch.")

    def problems(self, loaded: set[str] | None) -> list[str]:
        """One line for each parameter that was not filled and each tensor that did not fit; empty if all is well.

        `loaded`: the names that the model's loader reports, None if it reports none. A parameter that it reports is
        taken for loaded unless just a part of it was written.
        """
        found = []
        for filled in self._filled.values():
            total = filled.parameter.numel()
            written = sum(math.prod(sizes) for _, sizes, _ in filled.written)
            if written >= total or _storage_of(filled.parameter) != filled.storage:  # the loader put in another tensor
                continue
            if written == 0 and loaded is not None and filled.name in loaded:
                continue
            absent = self._absent_of(filled) or [filled.name]
            part = f", {written} of its {total} values came" if written else ""
            found.append(f"{', '.join(absent)} missing (parameter {filled.name}{part})")
        for offered in self._all_offered:
            if offered.cast_from:
                found.append(
                    f"{offered.name} in {offered.where} is {offered.cast_from}, but config.json names no quantization "
                    "of it"
                )
            taken, total = sum(math.prod(sizes) for _, sizes, _ in offered.taken), math.prod(offered.shape)
            if 0 < taken < total:
                found.append(
                    f"{offered.name} in {offered.where} does not fit: of shape {list(offered.shape)} the model took "
                    f"{taken} values of {total}"
                )
        return found

    def _absent_of(self, filled: _Filled) -> list[str]:
        """The tensors that this parameter lacks, as those of its like in other layers tell."""
        numbers = re.findall(r"\d+", filled.name)
        expected: set[str] = set()
        for other in self._filled.values():
            if other is not filled and re.sub(r"\d+", "0", other.name) == re.sub(r"\d+", "0", filled.name):
                for source in other.sources:
                    if len(re.findall(r"\d+", source)) == len(numbers):
                        rest = iter(numbers)
                        expected.add(re.sub(r"\d+", lambda _, rest=rest: next(rest), source))  # type: ignore[misc]
        return sorted(expected - filled.sources)


def _storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _region_of(tensor: torch.Tensor) -> _Region:
    return tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride())
