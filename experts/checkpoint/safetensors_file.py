"""Lazy access to safetensors files: headers are parsed; data is memory-mapped, and read only when needed."""

from __future__ import annotations

import mmap
import os
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from experts.checkpoint.errors import CheckpointError
from experts.checkpoint.header import TensorEntry, open_weights, parse_header
from experts.checkpoint.index import INDEX_NAME, WeightIndex
from experts.checkpoint.sources.base import ModelSource
from experts.checkpoint.sources.folder import FolderSource

if TYPE_CHECKING:
    import torch

# Private and writable, so that torch accepts the buffer without a warning. Nothing is written, so nothing is reserved.
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # mmap.MAP_NORESERVE exists from Python 3.13
_MAP_FLAGS = mmap.MAP_PRIVATE | _MAP_NORESERVE


class SafetensorsFile:
    """One file. Opening it reads the header and maps the data. Safe to use from several threads.

    A router may first read data after days, when a shard is lost. The mapping still has what the header describes, even
    if the file was deleted or replaced meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_weights(path) as file:
            self.entries = parse_header(file, path)
            size = os.fstat(file.fileno()).st_size
            self._map = mmap.mmap(file.fileno(), size, flags=_MAP_FLAGS, prot=mmap.PROT_READ | mmap.PROT_WRITE)

    def view(self, start: int, nbytes: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """The bytes `[start, start + nbytes)` as a tensor: a view of the mapping if aligned, else a copy."""
        import torch

        if nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        page = start - start % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_WILLNEED, page, start + nbytes - page)
        if start % dtype.itemsize == 0:
            return torch.frombuffer(self._map, dtype=dtype, count=nbytes // dtype.itemsize, offset=start).view(shape)
        return torch.frombuffer(bytearray(self._map[start : start + nbytes]), dtype=dtype).view(shape)


class TensorStore:
    """All tensors of a checkpoint by name; `index` decides the file. Files are fetched when first needed, if they come
    from a `source`, and headers parsed.
    """

    def __init__(self, folder: Path, source: ModelSource | None = None) -> None:
        self.folder = folder
        self.source = FolderSource(folder) if source is None else source
        self.index = WeightIndex.of_folder(folder)
        self._lock = threading.Lock()
        self._files: dict[Path, SafetensorsFile] = {}

    def fetch(self, names: Iterable[str]) -> None:
        """Have the files of these tensors in the folder. CheckpointError names a tensor or file that cannot be had."""
        self.source.fetch(self.index.files_of(names))

    def _open(self, path: Path) -> SafetensorsFile:
        if path not in self._files and self.source.remote:
            self.source.fetch([path.relative_to(self.folder).as_posix()])
        with self._lock:
            if path not in self._files:
                self._files[path] = SafetensorsFile(path)
            return self._files[path]

    def __contains__(self, name: str) -> bool:
        return name in self.index

    def entry(self, name: str) -> TensorEntry:
        """Header entry of a tensor; CheckpointError names the tensor or file that is missing."""
        path = self.index.path_of(name)
        entry = self._open(path).entries.get(name)
        if entry is None:
            raise CheckpointError(f"{path}: tensor {name} is missing, though {INDEX_NAME} says it is in this file")
        return entry

    def check_index(self) -> None:
        """Check that every tensor is in the file that the index names, of the files that are here. Reads headers only.

        CheckpointError names the tensor and the file.
        """
        for path, names in self.index.by_file().items():
            if self.is_here(names[0]):
                entries = self._open(path).entries
                for name in names:
                    if name not in entries:
                        self.entry(name)  # which raises

    def is_here(self, name: str) -> bool:
        """Whether the file of a tensor is in the folder: a model may be fetched without the files nobody needs here."""
        path = self.index.path_of(name)
        return path in self._files or os.path.lexists(path)

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor: a view of the file's mapping if aligned there. CheckpointError as in `entry`."""
        entry = self.entry(name)
        return self.read(entry, entry.start, entry.nbytes, entry.shape)

    def read(self, entry: TensorEntry, start: int, nbytes: int, shape: tuple[int, ...]) -> torch.Tensor:
        """A byte range of the entry's file as a tensor of the entry's dtype. All reads of data go through here."""
        return self._open(entry.file).view(start, nbytes, entry.dtype, shape)
