"""Numba functions with a cache that follows the sources: `@compiled()` instead of `@njit(cache=True)`.

Numba keys a cached function on its own file alone, so a change to a callee in another file would go unnoticed: after an
upgrade, a router would run yesterday's rule for choosing replicas. Here the cache folder is named after the content of
all sources that may be compiled together, so a changed source starts with an empty folder.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
from numba import config

# Top-level packages with compiled functions. Each calls those of the packages before it.
_PACKAGES = ("placement", "experts", "benchmarks")
_IMPORT = re.compile(rf"^(?:from|import) ((?:{'|'.join(_PACKAGES)})(?:\.\w+)*)\b", re.MULTILINE)
_STALE_AFTER_S = 30 * 86_400.0


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: `numba.njit(nogil=True, **options)`, cached until a source it may call changes."""

    def wrap(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(nogil=True, **options)(function)
        if not config.DISABLE_JIT:
            with _cache_of(function):
                dispatcher.enable_caching()
        return dispatcher

    return wrap


def compiled_callback(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: `numba.cfunc(signature)` for calls from C++, with the same cache; compiled when first asked for.

    It takes the GIL only to report an error.
    """

    def wrap(function: Callable[..., Any]) -> Callback:
        return Callback(signature, function)

    return wrap


class Callback:
    """A function that C++ can call."""

    def __init__(self, signature: Any, function: Callable[..., Any]) -> None:
        self._signature, self._function = signature, function

    @functools.cached_property
    def address(self) -> int:
        """Where the machine code is; valid as long as this object."""
        with _cache_of(self._function):
            self._compiled = numba.cfunc(self._signature, nopython=True, cache=True)(self._function)
        return int(self._compiled.address)


@contextlib.contextmanager
def _cache_of(function: Callable[..., Any]) -> Iterator[None]:
    """Numba reads the folder once, when it sets up a function's cache."""
    before, config.CACHE_DIR = config.CACHE_DIR, str(_compiled_folder(function.__module__.partition(".")[0]))
    try:
        yield
    finally:
        config.CACHE_DIR = before


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
    index = _PACKAGES.index(package) if package in _PACKAGES else len(_PACKAGES) - 1
    texts = {
        path: text
        for name in _PACKAGES[: index + 1]
        for path in (root / name).rglob("*.py")
        if "@compiled(" in (text := path.read_text())
    }
    modules = {module for text in texts.values() for module in _IMPORT.findall(text)}
    imported = (root.joinpath(*module.split(".")).with_suffix(".py") for module in modules)
    return sorted({*texts, *(path for path in imported if path.exists())})


@functools.cache
def _compiled_folder(package: str) -> Path:
    root = Path(__file__).parents[1]
    key = hashlib.sha256()
    for path in compiled_sources(root, package):
        key.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    folder = cache_folder() / f"numba-{package}-{key.hexdigest()[:16]}"
    if not folder.exists():
        _drop_stale(folder.parent)
        folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    return folder


def _drop_stale(cache: Path) -> None:
    """Remove the folders of sources that no process has used for a month."""
    for folder in cache.glob("numba-*"):
        with contextlib.suppress(FileNotFoundError):  # another process cleans up as well
            if time.time() - folder.stat().st_mtime > _STALE_AFTER_S:
                shutil.rmtree(folder, ignore_errors=True)
