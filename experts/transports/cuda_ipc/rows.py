"""Memory for the rows of a pair: made by the shard, mapped by the router, read and written by both.

`DeviceRows` is on a GPU. `HostRows` stands in for it where there is none: the same pairs, links and faults run over it
in tests, and only the calls of `cudart` do not.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from abc import ABC, abstractmethod

import numpy as np
import torch

from experts.transports.cuda_ipc import cudart


class CannotMapError(RuntimeError):
    """This end cannot reach the other end's memory."""


class PairRows(ABC):
    """uint8 memory of one pair, seen from one end."""

    tensor: torch.Tensor
    handle: bytes
    """By which the other end maps it."""

    @abstractmethod
    def settle(self) -> None:
        """Wait until what the calling thread has queued is done, so that the other end may look."""

    @abstractmethod
    def close(self) -> None:
        """Unmap it, or free it at the end that made it; the tensor must not be used any more. May block."""


def make_rows(nbytes: int, device: str) -> PairRows:
    """Zeros at the end that makes them. CudaError without room or without sharing."""
    return DeviceRows(nbytes, device) if device.startswith("cuda") else HostRows(nbytes)


def map_rows(handle: bytes, nbytes: int, device: str) -> PairRows:
    """The other end's `make_rows(nbytes)`, for `device` to read and write. CannotMapError."""
    try:
        return DeviceRows(nbytes, device, handle) if device.startswith("cuda") else HostRows(nbytes, handle)
    except (cudart.CudaError, OSError, ValueError) as error:
        raise CannotMapError(str(error)) from error


class DeviceRows(PairRows):
    """On a GPU, outside of torch's allocator."""

    def __init__(self, nbytes: int, device: str, handle: bytes | None = None) -> None:
        index = torch.device(device).index
        self._device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        self._mine = handle is None
        with torch.cuda.device(self._device):
            if handle is None:
                self._address = cudart.allocate(nbytes)
                try:
                    self.handle = cudart.handle_of(self._address)
                except BaseException:
                    cudart.free(self._address)
                    raise
            else:
                if len(handle) != cudart.HANDLE_BYTES:
                    raise ValueError(f"a handle of {len(handle)} bytes, expected {cudart.HANDLE_BYTES}")
                self.handle, self._address = handle, cudart.map_handle(handle)
        # Labelled with this end's device, which is the one that runs kernels on it, wherever the memory is.
        storage = torch._C._construct_storage_from_data_pointer(self._address, self._device, nbytes)
        self.tensor = torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)
        if self._mine:
            self.tensor.zero_()
            self.settle()

    def settle(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()

    def close(self) -> None:
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()  # kernels of any thread may still be at it
            (cudart.free if self._mine else cudart.unmap)(self._address)


class HostRows(PairRows):
    """In host memory without a name. Its handle is a path, which processes of the same user can open."""

    def __init__(self, nbytes: int, handle: bytes | None = None) -> None:
        if handle is None:
            self._descriptor = os.memfd_create("expertmesh-rows", os.MFD_CLOEXEC)
            os.ftruncate(self._descriptor, nbytes)
            self.handle = f"/proc/{os.getpid()}/fd/{self._descriptor}".encode()
        else:
            self._descriptor, self.handle = os.open(handle, os.O_RDWR | os.O_CLOEXEC), handle
        try:
            self.tensor = torch.from_numpy(np.frombuffer(mmap.mmap(self._descriptor, nbytes), np.uint8))
        except BaseException:
            os.close(self._descriptor)
            raise

    def settle(self) -> None:
        """Nothing is queued on the host."""

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._descriptor)
