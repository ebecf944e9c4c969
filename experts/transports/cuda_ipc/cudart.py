"""The five calls of CUDA's runtime that map one process's GPU memory into another, which torch has no form for.

torch shares tensors of its allocator (torch.multiprocessing), but keeps them until the receiver has given them back,
also if it died. Memory of our own is freed when its pair is over.

Source: signatures as in NVIDIA's cuda_runtime_api.h; the library is found as vLLM's cuda_wrapper.py finds it.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

HANDLE_BYTES = 64  # CUDA_IPC_HANDLE_SIZE
_LAZY_PEER_ACCESS = 1  # cudaIpcMemLazyEnablePeerAccess


class CudaError(RuntimeError):
    """A call of CUDA's runtime failed; nothing of it is left for later calls to trip over."""


class _Handle(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_char * HANDLE_BYTES),)


@functools.cache
def _library() -> Any:
    """The runtime that torch uses in this process. CudaError if it has none."""
    import torch

    if not torch.cuda.is_available():
        raise CudaError("torch sees no CUDA device")
    torch.cuda.init()
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if "libcudart" in line or "libamdhip64" in line}
    if not paths:
        raise CudaError("this build of torch loads no libcudart, so GPU memory cannot be shared")
    library = ctypes.CDLL(sorted(paths)[0])
    pointer = ctypes.POINTER(ctypes.c_void_p)
    for name, arguments in (
        ("cudaMalloc", [pointer, ctypes.c_size_t]),
        ("cudaFree", [ctypes.c_void_p]),
        ("cudaIpcGetMemHandle", [ctypes.POINTER(_Handle), ctypes.c_void_p]),
        ("cudaIpcOpenMemHandle", [pointer, _Handle, ctypes.c_uint]),
        ("cudaIpcCloseMemHandle", [ctypes.c_void_p]),
        ("cudaGetLastError", []),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = ctypes.c_int, arguments
    library.cudaGetErrorString.restype, library.cudaGetErrorString.argtypes = ctypes.c_char_p, [ctypes.c_int]
    return library


def _call(name: str, *arguments: Any) -> None:
    library = _library()
    status = getattr(library, name)(*arguments)
    if status != 0:
        library.cudaGetLastError()  # or torch's next check would raise it
        raise CudaError(f"{name}: {library.cudaGetErrorString(status).decode()}")


def allocate(nbytes: int) -> int:
    """Address of `nbytes` on the current device. CudaError if there is no room."""
    address = ctypes.c_void_p()
    _call("cudaMalloc", ctypes.byref(address), nbytes)
    return int(address.value or 0)


def free(address: int) -> None:
    """Give back what `allocate` gave."""
    _call("cudaFree", address)


def handle_of(address: int) -> bytes:
    """By which another process of the host may map the memory that `allocate` gave. CudaError where this is not to be
    had (some virtual GPUs)."""
    handle = _Handle()
    _call("cudaIpcGetMemHandle", ctypes.byref(handle), address)
    return bytes(handle)


def map_handle(handle: bytes) -> int:
    """Address at which the current device reaches another process's memory. CudaError if it cannot.

    The memory may be on a GPU that CUDA_VISIBLE_DEVICES hides from this process.
    """
    address = ctypes.c_void_p()
    _call("cudaIpcOpenMemHandle", ctypes.byref(address), _Handle.from_buffer_copy(handle), _LAZY_PEER_ACCESS)
    return int(address.value or 0)


def unmap(address: int) -> None:
    """Undo `map_handle`."""
    _call("cudaIpcCloseMemHandle", address)
