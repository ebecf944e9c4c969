"""A GPU made of host memory, for movers of rows on a device: see fake_cuda.cpp."""

from __future__ import annotations

import ctypes
import functools
import tempfile
from pathlib import Path
from typing import Any

import torch

from experts.dispatch.rows.cuda.driver import SOURCE, Driver
from experts.native.build import compile_source, find_compiler

_CALLS = ("fake_copy_to_host", "fake_copy_to_device", "fake_synchronize", "fake_launch")


@functools.cache
def _library() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "fake_cuda.so"
        compile_source(find_compiler(), Path(__file__).with_suffix(".cpp"), target, f"-I{SOURCE.parent}")
        library = ctypes.CDLL(str(target))
    library.fake_program.restype, library.fake_program.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    return library


class FakeDriver(Driver):
    """Works on CPU tensors. What is queued happens at the next wait of the same thread, and not before."""

    pins_memory = False

    def calls(self) -> tuple[int, int, int, int]:
        first, second, third, fourth = (
            ctypes.cast(getattr(_library(), name), ctypes.c_void_p).value for name in _CALLS
        )
        return first or 0, second or 0, third or 0, fourth or 0

    def programs(self, device: torch.device, dtype: torch.dtype) -> tuple[int, int]:
        combine = f"combine_{str(dtype).removeprefix('torch.')}"
        return _library().fake_program(b"pack_rows"), _library().fake_program(combine.encode())

    def stream(self, device: torch.device) -> int:
        return 0

    def name_of(self, error: int) -> str:
        return f"made-up error {error}"

    def wait(self) -> None:
        """Until all that this thread has queued is done, as reading a tensor of a GPU would."""
        _library().fake_synchronize(None)

    def forget(self) -> None:
        """Drop what this thread has queued; its memory may be gone."""
        _library().fake_forget()

    def fail_after(self, calls: int) -> None:
        """Let the driver's call after so many others of this thread fail."""
        _library().fake_fail_after(calls)
