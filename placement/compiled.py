"""Numba functions with a cache that follows the sources: `@compiled()` instead of `@njit(cache=True)`.

Numba keys a cached function on its own file alone, so a change to a callee in another file would go unnoticed: after an
upgrade, a router would run yesterday's rule for choosing replicas. Here the cache folder is named after the content of
all sources that may be compiled together, so a changed source starts with an empty folder.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
from numba import config

from placement.compile_cache import compiled_folder

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


def mark_compiled(package: str) -> Path:
    """The file that says, once it exists, that this machine has compiled all of a package; another one may lack it."""
    from llvmlite import binding

    processor = re.sub(r"\W+", "-", binding.get_host_cpu_name())
    return _made_folder(package) / f"complete-{sys.implementation.cache_tag}-{numba.__version__}-{processor}"


@contextlib.contextmanager
def _cache_of(function: Callable[..., Any]) -> Iterator[None]:
    """Numba reads the folder once, when it sets up a function's cache."""
    before, config.CACHE_DIR = config.CACHE_DIR, str(_made_folder(function.__module__.partition(".")[0]))
    try:
        yield
    finally:
        config.CACHE_DIR = before


@functools.cache
def _made_folder(package: str) -> Path:
    folder = compiled_folder(package)
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
