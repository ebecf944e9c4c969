"""CUDA's driver and its run-time compiler (NVRTC), as far as rows need them; torch brings both along.

Source: signatures as in NVIDIA's cuda.h and nvrtc.h; torch's `torch.cuda._utils` finds the libraries by these names.
"""

from __future__ import annotations

import ctypes
import functools
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_name("programs.cu")
# What device.h calls, in its order.
CALLS = ("cuMemcpyDtoHAsync_v2", "cuMemcpyHtoDAsync_v2", "cuStreamSynchronize", "cuLaunchKernel")
_COMBINE = {torch.float32: "combine_float32", torch.bfloat16: "combine_bfloat16", torch.float16: "combine_float16"}


class DriverError(RuntimeError):
    """A call of the driver or of the compiler failed; the message names it."""


class Driver(ABC):
    """What a mover of rows on a device asks of it. Tests have one that works in host memory."""

    pins_memory = True
    """Whether host memory that the device copies from or to has to be pinned."""

    @abstractmethod
    def calls(self) -> tuple[int, int, int, int]:
        """Addresses of the functions named in `CALLS`."""

    @abstractmethod
    def programs(self, device: torch.device, dtype: torch.dtype) -> tuple[int, int]:
        """Handles of the programs that pack and combine rows of `dtype`. DriverError if they cannot be compiled."""

    @abstractmethod
    def stream(self, device: torch.device) -> int:
        """Handle of the calling thread's current stream; 0 is the default one."""

    @abstractmethod
    def name_of(self, error: int) -> str:
        """What an error's number says."""


class CudaDriver(Driver):
    """NVIDIA's."""

    def calls(self) -> tuple[int, int, int, int]:
        library = _driver()
        first, second, third, fourth = (ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in CALLS)
        return first or 0, second or 0, third or 0, fourth or 0

    def programs(self, device: torch.device, dtype: torch.dtype) -> tuple[int, int]:
        index = torch.cuda.current_device() if device.index is None else device.index
        module = _module(index)
        return _function(module, "pack_rows"), _function(module, _COMBINE[dtype])

    def stream(self, device: torch.device) -> int:
        return int(torch._C._cuda_getCurrentRawStream(device.index or 0))  # type: ignore[attr-defined]

    def name_of(self, error: int) -> str:
        text = ctypes.c_char_p()
        _driver().cuGetErrorName(error, ctypes.byref(text))
        return (text.value or b"an unknown error").decode()


@functools.cache
def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DriverError(f"CUDA's driver cannot be loaded: {error}") from error


@functools.cache
def _compiler() -> Any:
    major = str(torch.version.cuda).partition(".")[0]
    for name in (f"libnvrtc.so.{major}", "libnvrtc.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise DriverError(f"NVRTC cannot be loaded, neither libnvrtc.so.{major} nor libnvrtc.so")


@functools.cache
def _module(index: int) -> int:
    """Handle of the compiled programs on one GPU; they stay loaded."""
    with torch.cuda.device(index):
        torch.cuda.current_stream().synchronize()  # makes the GPU's context the thread's
        binary = compile_programs(*torch.cuda.get_device_capability(index))
        module = ctypes.c_void_p()
        _check("cuModuleLoadData", _driver().cuModuleLoadData(ctypes.byref(module), binary))
    return int(module.value or 0)


def _function(module: int, name: str) -> int:
    function = ctypes.c_void_p()
    status = _driver().cuModuleGetFunction(ctypes.byref(function), ctypes.c_void_p(module), name.encode())
    _check(f"cuModuleGetFunction of {name}", status)
    return int(function.value or 0)


def _check(call: str, status: int) -> None:
    if status:
        raise DriverError(f"{call}: {CudaDriver().name_of(status)}")


def compile_programs(major: int, minor: int) -> bytes:
    """Machine code of `programs.cu` for GPUs of compute capability `major`.`minor`; needs no GPU. DriverError."""
    compiler = _compiler()
    program = ctypes.c_void_p()
    status = compiler.nvrtcCreateProgram(
        ctypes.byref(program), SOURCE.read_bytes(), SOURCE.name.encode(), 0, None, None
    )
    if status:
        raise DriverError(f"nvrtcCreateProgram: error {status}")
    try:
        options = (ctypes.c_char_p * 2)(f"--gpu-architecture=sm_{major}{minor}".encode(), b"--std=c++17")
        status = compiler.nvrtcCompileProgram(program, len(options), options)
        size = ctypes.c_size_t()
        if status:
            compiler.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            compiler.nvrtcGetProgramLog(program, log)
            raise DriverError(f"nvrtcCompileProgram, for sm_{major}{minor}: error {status}: {log.value.decode()}")
        compiler.nvrtcGetCUBINSize(program, ctypes.byref(size))
        binary = ctypes.create_string_buffer(size.value)
        compiler.nvrtcGetCUBIN(program, binary)
        return binary.raw
    finally:
        compiler.nvrtcDestroyProgram(ctypes.byref(program))
