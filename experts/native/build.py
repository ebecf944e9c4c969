"""Compiles C++ once for this machine, into the cache. Needs a C++ compiler, as vLLM's CPU compile path does."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path

from placement.compile_cache import cache_folder

logger = logging.getLogger(__name__)

FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-shared", "-fPIC")
COMPILE_TIMEOUT_S = 120.0


class NativeBuildError(RuntimeError):
    """C++ cannot be built on this machine; the message says why."""


def build_library(source: Path) -> Path:
    """The library made of `source` and the headers that it includes by name, compiled if the cache lacks it.

    NativeBuildError says why it cannot be.
    """
    compiler = find_compiler()
    target = library_path(source, compiler)
    if target.exists():
        return target
    with open(target.parent / "build.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # bounded: the holder's compiler has a time-out
        if not target.exists():
            compile_source(compiler, source, target)
    return target


def library_path(source: Path, compiler: str) -> Path:
    """Where the library of `source` is, once it has been compiled here."""
    key = hashlib.sha256()
    texts = [path.read_text() for path in sorted(_with_headers(source))]
    for text in (*texts, *FLAGS, compiler, _version(compiler), _machine()):
        key.update(text.encode() + b"\0")
    return cache_folder() / f"{source.stem.replace('_', '-')}-{key.hexdigest()[:16]}.so"


def _with_headers(source: Path) -> set[Path]:
    """`source` and all that it includes in quotes, by itself or through another header."""
    found: set[Path] = set()
    waiting = [source.resolve()]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            names = re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)
            waiting += [(path.parent / name).resolve() for name in names]
    return found


def compile_source(compiler: str, source: Path, target: Path, *more_flags: str) -> None:
    """Compile `source` to the shared library `target`. NativeBuildError quotes the compiler."""
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    start_s = time.monotonic()
    error = ""
    for openmp in (["-fopenmp"], []):  # without OpenMP's runtime kernels have one thread
        partial = target.with_suffix(f".{os.getpid()}.partial")
        command = [compiler, *FLAGS, native, *more_flags, *openmp, str(source), "-o", str(partial)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            raise NativeBuildError(f"{compiler} took longer than {COMPILE_TIMEOUT_S:.0f} s") from None
        if done.returncode == 0:
            partial.replace(target)
            logger.info("compiled %s in %.1f s: %s", source.name, time.monotonic() - start_s, target)
            return
        error = done.stderr.strip()[-500:]
        partial.unlink(missing_ok=True)
    raise NativeBuildError(f"{compiler} failed: {error}")


def find_compiler() -> str:
    """Path of the C++ compiler: $CXX, else the first usual name on the path. NativeBuildError if there is none."""
    wanted = os.environ.get("CXX", "")
    for name in filter(None, (wanted, "c++", "g++", "clang++")):
        path = shutil.which(name)
        if path:
            return path
    raise NativeBuildError("no C++ compiler: none of $CXX, c++, g++, clang++ is on the path; install one")


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout


def _machine() -> str:
    """The processor's model and features, which determine the code for `native`."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "|".join(sorted({line for line in lines if line.startswith(wanted)}))
