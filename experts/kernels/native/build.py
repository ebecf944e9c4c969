"""Compiles the C++ kernel once for this machine and loads it. Needs a C++ compiler, as vLLM's CPU compile path does."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path

from placement.compiled import cache_folder

logger = logging.getLogger(__name__)

SOURCES = ("native_vec.h", "native_pack.h", "native_mlp.cpp")
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-shared", "-fPIC")
COMPILE_TIMEOUT_S = 120.0


class NativeBuildError(RuntimeError):
    """The C++ kernel cannot be built on this machine; the message says why."""


@functools.cache
def load_library() -> ctypes.CDLL:
    """The compiled kernel with its signatures set. Compiled on first use into the cache folder of `placement.compiled`.

    Raises NativeBuildError, on later calls too.
    """
    library, error = _try_load()
    if library is None:
        raise NativeBuildError(error)
    return library


@functools.cache
def _try_load() -> tuple[ctypes.CDLL | None, str]:
    try:
        library = ctypes.CDLL(str(build_library()))
    except (NativeBuildError, OSError) as error:
        return None, str(error)
    declare_functions(library)
    return library, ""


def declare_functions(library: ctypes.CDLL) -> None:
    """Set the argument and result types of the library's functions."""
    i32, i64, f32, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
    library.expert_mlp_slot_bytes.argtypes = [i32, i64, i64]
    library.expert_mlp_slot_bytes.restype = i64
    library.expert_mlp_lanes.argtypes = []
    library.expert_mlp_lanes.restype = i32
    library.expert_mlp_pack.argtypes = [i32, i64, i64, pointer, pointer, pointer, pointer, pointer]
    library.expert_mlp_pack.restype = None
    library.expert_mlp_create.argtypes = [i32, i64, i64, i64, i64, i32, f32, f32, i32, pointer, pointer]
    library.expert_mlp_create.restype = pointer
    library.expert_mlp_probe.argtypes = [i32, i64]
    library.expert_mlp_probe.restype = ctypes.c_double
    library.expert_mlp_destroy.argtypes = [pointer]
    library.expert_mlp_destroy.restype = None
    library.expert_mlp_forward.argtypes = [
        pointer, i64, i64, i64, pointer, i64, pointer, pointer, pointer, pointer, i64, i32,
    ]  # fmt: skip
    library.expert_mlp_forward.restype = i32


def build_library() -> Path:
    """The library's file in the cache, compiled if it is not there. NativeBuildError says why it cannot be."""
    compiler = find_compiler()
    folder = Path(__file__).parent
    key = hashlib.sha256()
    for text in (*((folder / name).read_text() for name in SOURCES), *FLAGS, compiler, _version(compiler), _machine()):
        key.update(text.encode() + b"\0")
    cache = cache_folder()
    target = cache / f"expert-mlp-{key.hexdigest()[:16]}.so"
    if target.exists():
        return target
    with open(cache / "build.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # bounded: the holder's compiler has a time-out
        if not target.exists():
            compile_source(compiler, folder / SOURCES[-1], target)
    return target


def compile_source(compiler: str, source: Path, target: Path, *more_flags: str) -> None:
    """Compile `source` to the shared library `target`. NativeBuildError quotes the compiler."""
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    start_s = time.monotonic()
    error = ""
    for openmp in (["-fopenmp"], []):  # without OpenMP's runtime the kernel has one thread
        partial = target.with_suffix(f".{os.getpid()}.partial")
        command = [compiler, *FLAGS, native, *more_flags, *openmp, str(source), "-o", str(partial)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            raise NativeBuildError(f"{compiler} took longer than {COMPILE_TIMEOUT_S:.0f} s") from None
        if done.returncode == 0:
            partial.replace(target)
            logger.info("compiled the expert kernel in %.1f s: %s", time.monotonic() - start_s, target)
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
