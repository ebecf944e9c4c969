"""Loads the compiled data plane (data_plane.cpp) and names its functions."""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

from experts.native.build import NativeBuildError, build_library
from experts.native.structs import (
    NativeChannel,
    NativeDevice,
    NativeHints,
    NativeLink,
    NativeRouter,
    NativeRouterCounts,
    NativeShard,
    NativeShardCounts,
    NativeSlotWords,
)

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("data_plane.cpp")

_i64, _pointer = ctypes.c_int64, ctypes.c_void_p
# Arguments of each function; all return int64.
_FUNCTIONS = {
    "data_plane_sizes": [_pointer],
    "data_plane_post": [_pointer, _i64],
    "data_plane_progress": [_pointer],
    "data_plane_wait": [_pointer, _i64],
    "data_plane_poll": [_pointer],
    "data_plane_reply": [_pointer, _i64],
    "data_plane_begin": [_pointer],
    "data_plane_finish": [_pointer, _pointer],
    "data_plane_fetch": [_pointer, ctypes.c_uint64, ctypes.c_uint64, _i64],
    "data_plane_combine": [_pointer, _i64, _pointer, _i64, _pointer],
    "data_plane_serve": [_pointer, _pointer, _i64, _i64],
    "data_plane_replace_table": [_pointer, _pointer],
    "data_plane_echo": [_pointer, _pointer, _pointer, _i64, _i64, _i64],
    "data_plane_cut_tiles": [_pointer, _i64, _i64, _i64, _pointer, _i64, _pointer, _pointer],
    "data_plane_answer": [_pointer, _i64],
    "data_plane_ping": [_pointer, _pointer, _pointer, _i64, _pointer, _pointer, _i64, _i64, _i64, _pointer],
    "data_plane_ping_link": [_pointer, _pointer, _pointer, _i64, _i64, _pointer],
    "data_plane_copy_rows_address": [],
    "data_plane_tcp_make": [_i64, ctypes.c_uint64, _pointer, _pointer, _i64, _pointer],
    "data_plane_tcp_ended": [_pointer],
    "data_plane_tcp_quiet": [_pointer],
    "data_plane_tcp_free": [_pointer],
    "data_plane_bell_make": [_pointer, _pointer],
    "data_plane_bell_ring": [_pointer],
    "data_plane_bell_wait": [_pointer, _i64, _i64, _i64],
    "data_plane_bell_ringers": [_pointer, _i64],
    "data_plane_bell_free": [_pointer],
}


@functools.cache
def data_plane() -> ctypes.CDLL | None:
    """The library, compiled on first use; None where it cannot be compiled, which the log says once."""
    try:
        library = ctypes.CDLL(str(build_library(SOURCE)))
    except (NativeBuildError, OSError) as error:
        logger.warning("the data plane runs without its C++ form, which is slower: %s", error)
        return None
    for name, arguments in _FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, _i64
    structs = (
        NativeLink, NativeChannel, NativeRouter, NativeRouterCounts, NativeShard, NativeShardCounts, NativeSlotWords,
        NativeHints, NativeDevice,
    )  # fmt: skip
    sizes = (_i64 * len(structs))()
    library.data_plane_sizes(sizes)
    assert list(sizes) == [ctypes.sizeof(struct) for struct in structs], "structs.py mirrors the headers"
    return library
