"""The headers of safetensors files: which tensors a file holds, and where. Needs no torch, and touches no data.

Format (https://huggingface.co/docs/safetensors): 8 bytes with the header's length (little-endian), a JSON object from
tensor name to {dtype, shape, data_offsets}, then the data. Offsets count from the end of the header.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import stat
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from experts.checkpoint.errors import CheckpointError

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100_000_000  # the format's own bound
LFS_POINTER = b"version https://git-lfs"
# The dtypes that torch has: its name for each, and bytes of a value.
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as the header describes it; `start` is its absolute position in the file, in bytes."""

    file: Path
    dtype_name: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype; CheckpointError if torch has no such dtype."""
        import torch

        try:
            return getattr(torch, DTYPES[self.dtype_name][0])
        except KeyError:
            raise CheckpointError(
                f"{self.file}: dtype is {self.dtype_name}, expected one of {sorted(DTYPES)}"
            ) from None


@contextlib.contextmanager
def open_weights(path: Path) -> Iterator[BinaryIO]:
    """A file of weights, opened for reading. CheckpointError names one that is missing or cannot be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for a writer
            raise CheckpointError(f"{path}: cannot be read: it is a {_kind(path)}, expected a safetensors file")
        with path.open("rb") as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _kind(path: Path) -> str:
    return "directory" if path.is_dir() else "special file"


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a file by name. CheckpointError names the file, and the tensor if one is at fault."""
    with open_weights(path) as file:
        return parse_header(file, path)


def parse_header(file: BinaryIO, path: Path) -> dict[str, TensorEntry]:
    """`read_header` of an open file."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
    if LFS_POINTER.startswith(prefix) and prefix:
        raise CheckpointError(
            f"{path}: this is a Git LFS pointer of {size} bytes, not the file; fetch it with `git lfs pull`"
        )
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(f"{path}: header length {length} in a file of {size} bytes; is it a safetensors file?")
    try:
        header = json.loads(file.read(length), object_pairs_hook=_no_name_twice)
    except _TwiceError as error:
        raise CheckpointError(f"{path}: the header has {error.name} twice") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is a JSON {type(header).__name__}, expected an object")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, 8 + length, size) for name, value in header.items()}
    in_order = sorted((e.start, e.start + e.nbytes, name) for name, e in entries.items() if e.nbytes)
    for (_, end, name), (start, _, other) in itertools.pairwise(in_order):
        if start < end:
            raise CheckpointError(f"{path}: {name} and {other} share bytes: one ends at {end}, one begins at {start}")
    return entries


def _entry(path: Path, name: str, value: Any, base: int, file_size: int) -> TensorEntry:
    try:
        shape = tuple(_natural(n) for n in value["shape"])
        first, last = (_integer(n) for n in value["data_offsets"])
        entry = TensorEntry(path, str(value["dtype"]), shape, base + first, last - first)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: header entry of {name} is malformed: {value!r}") from error
    if entry.nbytes < 0:
        raise CheckpointError(f"{path}: {name} has {entry.nbytes} bytes")
    if entry.dtype_name in DTYPES:
        expected = math.prod(shape) * DTYPES[entry.dtype_name][1]
        if entry.nbytes != expected:
            raise CheckpointError(
                f"{path}: {name} has {entry.nbytes} bytes, expected {expected} "
                f"for shape {list(shape)} of {entry.dtype_name}"
            )
    if first < 0 or base + last > file_size:
        raise CheckpointError(
            f"{path}: {name} ends at byte {base + last}, the file has {file_size}; is it a partial download?"
        )
    return entry


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is no integer")
    return value


def _natural(value: Any) -> int:
    if _integer(value) < 0:
        raise ValueError(f"{value} is negative")
    return value


class _TwiceError(Exception):
    """A JSON object has one name twice."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _TwiceError(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return found
