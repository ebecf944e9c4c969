"""Loads the compiled kernel (native_mlp.cpp)."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from experts.native.build import NativeBuildError, build_library

SOURCE = Path(__file__).with_name("native_mlp.cpp")


@functools.cache
def load_library() -> ctypes.CDLL:
    """The compiled kernel with its signatures set. Compiled on first use, see `experts.native.build`.

    Raises NativeBuildError, on later calls too.
    """
    library, error = _try_load()
    if library is None:
        raise NativeBuildError(error)
    return library


@functools.cache
def _try_load() -> tuple[ctypes.CDLL | None, str]:
    try:
        library = ctypes.CDLL(str(build_library(SOURCE)))
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
    library.expert_mlp_create.argtypes = [i32, i64, i64, i64, i64, i32, f32, f32, i32, pointer, pointer, pointer]
    library.expert_mlp_create.restype = pointer
    library.expert_mlp_take_out.argtypes = [pointer, pointer, i64]
    library.expert_mlp_take_out.restype = None
    library.expert_mlp_put_in.argtypes = [pointer, pointer, pointer, pointer, i64]
    library.expert_mlp_put_in.restype = None
    library.expert_mlp_probe.argtypes = [i32, i64]
    library.expert_mlp_probe.restype = ctypes.c_double
    library.expert_mlp_destroy.argtypes = [pointer]
    library.expert_mlp_destroy.restype = None
    library.expert_mlp_forward.argtypes = [
        pointer, i64, i64, i64, pointer, i64, pointer, pointer, pointer, pointer, i64, i32, i32, i32, pointer,
        i64,
    ]  # fmt: skip
    library.expert_mlp_forward.restype = i32
