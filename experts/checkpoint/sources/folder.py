"""A folder that is there already, the same on every node."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from experts.checkpoint.sources.base import ModelSource


@dataclass(frozen=True)
class FolderSource(ModelSource):
    """Nothing is fetched; whoever reads a file says if it is missing."""

    folder: Path

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def remote(self) -> bool:
        return False

    def resolved(self) -> FolderSource:
        return self

    def files(self) -> Mapping[str, int]:
        if not self.folder.is_dir():
            return {}
        return {path.name: path.stat().st_size for path in sorted(self.folder.iterdir()) if path.is_file()}

    def fetch(self, names: Collection[str]) -> Path:
        return self.folder
