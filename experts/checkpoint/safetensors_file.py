"""Lazy access to safetensors files: headers are parsed; data is memory-mapped, and read only when needed.

Format (https://huggingface.co/docs/safetensors): 8 bytes with the header's length (little-endian), a JSON object from
tensor name to {dtype, shape, data_offsets}, then the data. Offsets count from the end of the header.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experts.checkpoint.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own bound
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Private and writable, so that torch accepts the buffer without a warning. Nothing is written, so nothing is reserved.
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # mmap.MAP_NORESERVE exists from Python 3.13
_MAP_FLAGS = mmap.MAP_PRIVATE | _MAP_NORESERVE


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
        try:
            return DTYPES[self.dtype_name]
        except KeyError:
            raise CheckpointError(
                f"{self.file}: dtype is {self.dtype_name}, expected one of {sorted(DTYPES)}"
            ) from None


class SafetensorsFile:
    """One file. Opening it reads the header and maps the data. Safe to use from several threads.

    A router may first read data after days, when a shard is lost. The mapping still has what the header describes, even
    if the file was deleted or replaced meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = self._read_header()

    def _read_header(self) -> dict[str, TensorEntry]:
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                prefix = file.read(8)
                length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
                if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                    raise CheckpointError(
                        f"{self.path}: header length {length} in a file of {size} bytes; is it a safetensors file?"
                    )
                header: dict[str, Any] = json.loads(file.read(length))
                self._map = mmap.mmap(file.fileno(), size, flags=_MAP_FLAGS, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except FileNotFoundError:
            raise CheckpointError(f"{self.path}: the file is missing") from None
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error}") from error
        except ValueError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.path}: the header is not JSON: {error}") from error
        if not isinstance(header, dict):
            raise CheckpointError(f"{self.path}: the header is a JSON {type(header).__name__}, expected an object")
        header.pop("__metadata__", None)
        return {name: self._entry(name, value, 8 + length, size) for name, value in header.items()}

    def _entry(self, name: str, value: Any, base: int, file_size: int) -> TensorEntry:
        try:
            shape = tuple(int(n) for n in value["shape"])
            first, last = (int(n) for n in value["data_offsets"])
            entry = TensorEntry(self.path, str(value["dtype"]), shape, base + first, last - first)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path}: header entry of {name} is malformed: {value!r}") from error
        if entry.dtype_name in DTYPES and entry.nbytes != math.prod(shape) * entry.dtype.itemsize:
            raise CheckpointError(
                f"{self.path}: {name} has {entry.nbytes} bytes, expected {math.prod(shape) * entry.dtype.itemsize} "
                f"for shape {list(shape)} of {entry.dtype_name}"
            )
        if first < 0 or base + last > file_size:
            raise CheckpointError(
                f"{self.path}: {name} ends at byte {base + last}, the file has {file_size}; is it a partial download?"
            )
        return entry

    def view(self, start: int, nbytes: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """The bytes `[start, start + nbytes)` as a tensor: a view of the mapping if aligned, else a copy."""
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        page = start - start % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_WILLNEED, page, start + nbytes - page)
        if start % dtype.itemsize == 0:
            return torch.frombuffer(self._map, dtype=dtype, count=nbytes // dtype.itemsize, offset=start).view(shape)
        return torch.frombuffer(bytearray(self._map[start : start + nbytes]), dtype=dtype).view(shape)


class TensorStore:
    """All tensors of a checkpoint folder by name, from one or several files. Headers are parsed when first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._files: dict[Path, SafetensorsFile] = {}
        self._file_of = self._index()

    def _index(self) -> dict[str, Path]:
        index = self.folder / INDEX_NAME
        if index.exists():
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
                return {str(name): self.folder / str(file) for name, file in weight_map.items()}
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise CheckpointError(f"{index}: expected an object with a weight_map: {error!r}") from error
        single = self.folder / "model.safetensors"
        paths = [single] if single.exists() else sorted(self.folder.glob("*.safetensors"))
        if not paths:
            raise CheckpointError(f"{self.folder}: found neither {INDEX_NAME} nor a .safetensors file")
        return {name: path for path in paths for name in self._open(path).entries}

    def _open(self, path: Path) -> SafetensorsFile:
        with self._lock:
            if path not in self._files:
                self._files[path] = SafetensorsFile(path)
            return self._files[path]

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def entry(self, name: str) -> TensorEntry:
        """Header entry of a tensor; CheckpointError names the tensor or file that is missing."""
        path = self._file_of.get(name)
        if path is None:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing")
        entry = self._open(path).entries.get(name)
        if entry is None:
            raise CheckpointError(f"{path}: tensor {name} is missing, though {INDEX_NAME} says it is in this file")
        return entry

    def read(self, entry: TensorEntry, start: int, nbytes: int, shape: tuple[int, ...]) -> torch.Tensor:
        """A byte range of the entry's file as a tensor of the entry's dtype. All reads of data go through here."""
        return self._open(entry.file).view(start, nbytes, entry.dtype, shape)
