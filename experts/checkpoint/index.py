"""Which file of a checkpoint each tensor comes from: the one place that decides it, for routers and shards alike.

`model.safetensors.index.json` decides where there is one: a file that it does not name is not opened, and a tensor that
stands in another file too comes from the one that it names. Without an index, the headers of all safetensors files in
the folder say it, and a tensor in two of them is refused. Needs no torch, and of a folder with an index nothing else.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from experts.checkpoint.errors import CheckpointError
from experts.checkpoint.header import read_header

INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class WeightIndex:
    """The file of each tensor, relative to the folder. `from_headers`: there was no index, so headers were read."""

    folder: Path
    file_of: Mapping[str, str]
    from_headers: bool

    @classmethod
    def of_folder(cls, folder: Path) -> WeightIndex:
        """Read the index, or without one all headers. CheckpointError names the file and tensor at fault."""
        path = folder / INDEX_NAME
        if not os.path.lexists(path):
            return cls(folder, _from_headers(folder), from_headers=True)
        try:
            text = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        return cls.from_json(text, folder)

    @classmethod
    def from_json(cls, text: str | bytes, folder: Path) -> WeightIndex:
        """The index of `folder` from the text of its file. CheckpointError as in `of_folder`."""
        path = folder / INDEX_NAME
        try:
            whole = json.loads(text, object_pairs_hook=_Object)
            weight_map = whole["weight_map"]
            pairs = weight_map.pairs
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path}: expected an object with a weight_map: {error!r}") from error
        file_of: dict[str, str] = {}
        for name, file in pairs:
            if not _is_inside(file):
                raise CheckpointError(f"{path}: {name} is said to be in {file!r}, expected a file in this folder")
            if file_of.setdefault(name, file) != file:
                raise CheckpointError(f"{path}: {name} is said to be in {file_of[name]} and in {file}; keep one")
        if not file_of:
            raise CheckpointError(f"{path}: its weight_map names no tensor")
        return cls(folder, file_of, from_headers=False)

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    @property
    def files(self) -> tuple[str, ...]:
        """All files that hold a tensor, in alphabetical order."""
        return tuple(sorted(set(self.file_of.values())))

    def files_of(self, names: Iterable[str]) -> tuple[str, ...]:
        """The files that hold these tensors, in alphabetical order. CheckpointError names a tensor that is in none."""
        return tuple(sorted({self._file(name) for name in names}))

    def path_of(self, name: str) -> Path:
        """Where a tensor is. CheckpointError if it is in no file."""
        return self._paths[self._file(name)]

    @functools.cached_property
    def _paths(self) -> dict[str, Path]:
        return {file: self.folder / file for file in self.files}

    def by_file(self) -> dict[Path, list[str]]:
        """The tensors of each file."""
        found: dict[Path, list[str]] = {}
        for name, file in self.file_of.items():
            found.setdefault(self._paths[file], []).append(name)
        return found

    def _file(self, name: str) -> str:
        file = self.file_of.get(name)
        if file is None:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing")
        return file


def _from_headers(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))
    if not paths:
        raise CheckpointError(f"{folder}: found neither {INDEX_NAME} nor a .safetensors file")
    file_of: dict[str, str] = {}
    for path in paths:
        for name in read_header(path):
            if name in file_of:
                raise CheckpointError(
                    f"{folder}: tensor {name} is in {file_of[name]} and in {path.name}, and no {INDEX_NAME} says which "
                    "one is right; remove the stale file"
                )
            file_of[name] = path.name
    return file_of


class _Object(dict[str, Any]):
    """A JSON object that also keeps what stands in it twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.pairs = pairs


def _is_inside(file: Any) -> bool:
    """Whether it is a relative path that does not leave the folder."""
    if not isinstance(file, str) or not file or "\0" in file:
        return False
    path = PurePosixPath(file)
    return not path.is_absolute() and ".." not in path.parts and path.name != ""
