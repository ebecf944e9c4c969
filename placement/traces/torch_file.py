"""Reads tensors from what `torch.save` wrote, without torch and without running anything the file names."""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

STORAGES = {
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
}


def _rebuild_tensor(
    storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_rest: Any
) -> np.ndarray:
    count = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else 0
    if count > len(storage) or min((offset, *size, *stride), default=0) < 0:
        raise ValueError(f"a tensor of {list(size)} does not fit its storage of {len(storage)}")
    steps = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps).copy()


class _Unpickler(pickle.Unpickler):
    """Accepts tensors and plain containers, and refuses any other name in the file."""

    def __init__(self, file: io.BytesIO, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(file)
        self._archive = archive
        self._root = root

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in STORAGES:
            return name
        raise ValueError(f"the file needs {module}.{name}, which is not read here")

    def persistent_load(self, key: Any) -> np.ndarray:
        kind, storage, name = key[0], key[1], key[2]
        if kind != "storage" or storage not in STORAGES:
            raise ValueError(f"unknown storage {storage!r} in the file")
        return np.frombuffer(self._archive.read(f"{self._root}/data/{name}"), STORAGES[storage])


def read_torch_file(path: str | Path) -> Any:
    """What was saved, with numpy arrays for tensors. Raises ValueError if the file holds more than plain data."""
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("not a file of torch.save: it has no data.pkl")
        root = pickles[0].removesuffix("/data.pkl")
        try:
            return _Unpickler(io.BytesIO(archive.read(pickles[0])), archive, root).load()
        except (pickle.UnpicklingError, AttributeError, IndexError, TypeError) as error:
            raise ValueError(f"its pickle is not readable: {error}") from None
