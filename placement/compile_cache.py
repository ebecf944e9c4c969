"""Where compiled code is kept, and which sources name a folder of it. Imports no compiler."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import tempfile
from pathlib import Path

# Top-level packages with compiled functions. Each calls those of the packages before it.
PACKAGES = ("placement", "experts", "benchmarks")
_IMPORT = re.compile(rf"^(?:from|import) ((?:{'|'.join(PACKAGES)})(?:\.\w+)*)\b", re.MULTILINE)


def cache_folder() -> Path:
    """Where compiled code is kept: `$EXPERTMESH_CACHE`, else `$XDG_CACHE_HOME/expertmesh`, else `~/.cache/expertmesh`.

    If that is not writable, a temporary folder of this process.
    """
    base = os.environ.get("EXPERTMESH_CACHE")
    folder = Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "expertmesh"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return _temporary_folder()


@functools.cache
def _temporary_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="expertmesh-"))


def compiled_sources(root: Path, package: str) -> list[Path]:
    """The files under `root` that decide what a compiled function of `package` does.

    These are the files with compiled functions, in the package and those it may call, and the project's modules they
    import constants from. A package that is not listed may call all of them.
    """
    index = PACKAGES.index(package) if package in PACKAGES else len(PACKAGES) - 1
    texts = {
        path: text
        for name in PACKAGES[: index + 1]
        for path in (root / name).rglob("*.py")
        if "@compiled(" in (text := path.read_text())
    }
    modules = {module for text in texts.values() for module in _IMPORT.findall(text)}
    imported = (root.joinpath(*module.split(".")).with_suffix(".py") for module in modules)
    return sorted({*texts, *(path for path in imported if path.exists())})


@functools.cache
def compiled_folder(package: str) -> Path:
    """The folder of Numba's results for the sources as they are; it need not exist yet."""
    root = Path(__file__).parents[1]
    key = hashlib.sha256()
    for path in compiled_sources(root, package):
        key.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return cache_folder() / f"numba-{package}-{key.hexdigest()[:16]}"
