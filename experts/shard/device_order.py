"""Keeps refills of slots and the requests that read them apart on a GPU, where a launch returns before it has run.

    compute thread           threads that fill slots
    launch a request
    note                ->   await_noted, then write:       what read the slot's last expert has read it
                             writing: on a stream of its own, and done when it ends
    launch the next     <-   publish

Nothing relies on both using the default stream.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch


class DeviceOrder:
    """On a CPU, where a call returns when it is done, nothing has to be kept apart."""

    def note(self) -> None:
        """The calling thread has launched all that read slots so far."""

    def await_noted(self) -> None:
        """Wait until what was launched before the last `note` has run. Not for the compute thread."""

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """What is launched inside has run when this ends, and delays no request."""
        yield


class GpuOrder(DeviceOrder):
    """On one GPU."""

    def __init__(self, device: str, cuda: Any = torch.cuda) -> None:
        """Waits first for what the calling thread has launched so far: slots are zeroed when they are allocated."""
        self._device = torch.device(device)
        self._cuda = cuda
        self._noted = cuda.Event()  # recorded again and again; who waits does so for the last time before
        self._own = threading.local()
        self.note()

    def note(self) -> None:
        self._noted.record(self._cuda.current_stream(self._device))

    def await_noted(self) -> None:
        self._noted.synchronize()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        stream = getattr(self._own, "stream", None)
        if stream is None:
            stream = self._own.stream = self._cuda.Stream(self._device)
        with self._cuda.stream(stream):
            try:
                yield
            finally:  # also after a failure: somebody else may write the slot next
                stream.synchronize()


def order_on(device: str) -> DeviceOrder:
    """For slots on `device`."""
    return GpuOrder(device) if torch.device(device).type == "cuda" else DeviceOrder()
