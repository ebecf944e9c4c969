"""Where the packed bytes of all slots are: a file for kernels on the CPU, pinned host memory for those of a GPU."""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from experts.kernels.offload.slot_reader import AT_A_TIME, BLOCK, SlotReader

Slot = tuple[int, int]  # layer, slot


class Backing(Protocol):
    """Holds every slot. Each may be read while another one is written."""

    def views(self, layer: int, slot: int) -> list[torch.Tensor]:
        """The slot's memory, uint8 [n] each, on the host."""

    def copy(self, slots: Sequence[Slot], targets: Sequence[Sequence[torch.Tensor]]) -> None:
        """Copy slots to where a kernel computes them, for each uint8 views like those of `views`.

        When it returns, or raises, no copy goes on.
        """

    @property
    def together(self) -> int:
        """So many copies in one go take hardly longer than one."""

    def note(self) -> None:
        """The calling thread has launched what reads targets of earlier copies: the next copies follow it."""

    def close(self) -> None:
        """Give the memory back. Nothing is read or written afterwards."""


class FileBacking:
    """A file without a name, which ends with the process. Linux keeps as much of it in memory as there is room for."""

    def __init__(self, folder: Path | None, num_layers: int, num_slots: int, view_bytes: Sequence[int]) -> None:
        """`folder` None is the folder for temporary files. OSError names it if it has too little room."""
        self._view_bytes = list(view_bytes)
        self._num_slots = num_slots
        self._stride = -(-sum(view_bytes) // BLOCK) * BLOCK
        size = num_layers * num_slots * self._stride
        where = folder or Path(tempfile.gettempdir())
        try:
            self._file = tempfile.TemporaryFile(dir=where, prefix="expertmesh-offload-")  # noqa: SIM115
            # All of it now: a mapped page that finds no room later would end the process.
            os.posix_fallocate(self._file.fileno(), 0, size)
        except OSError as error:
            told = f"{size / 1e9:.2f} GB of experts do not fit: {error.strerror}"
            raise OSError(error.errno, told, str(where)) from None
        self._map = mmap.mmap(self._file.fileno(), size)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._reader = SlotReader(self._file.fileno(), self._stride, size)

    def views(self, layer: int, slot: int) -> list[torch.Tensor]:
        """See `Backing`."""
        start, found = self._start(layer, slot), []
        for nbytes in self._view_bytes:
            found.append(torch.from_numpy(self._bytes[start : start + nbytes]))
            start += nbytes
        return found

    def _start(self, layer: int, slot: int) -> int:
        return (layer * self._num_slots + slot) * self._stride

    def copy(self, slots: Sequence[Slot], targets: Sequence[Sequence[torch.Tensor]]) -> None:
        """See `Backing`. Reading takes no page tables, as copying out of the mapping would."""
        starts = [self._start(layer, slot) for layer, slot in slots]
        self._reader.read_each(starts, [[view.numpy() for view in views] for views in targets])

    @property
    def together(self) -> int:
        """See `Backing`. Half of what is read at a time, so that a call that waits finds the disk half free."""
        return AT_A_TIME // 2 if self._reader.past_cache else 1

    def note(self) -> None:
        """On a CPU a call has ended when it returns."""

    def close(self) -> None:
        """See `Backing`. The mapping goes with its last view."""
        self._reader.close()
        self._file.close()


class PinnedBacking:
    """Host memory that a GPU reads by itself, on a stream of its own."""

    def __init__(
        self, device: str, num_layers: int, num_slots: int, view_bytes: Sequence[int], cuda: Any = torch.cuda
    ) -> None:
        """RuntimeError of torch if the host has too little memory. `cuda` is replaced by tests."""
        pinned = cuda is torch.cuda
        self._memory = [
            torch.zeros(num_layers, num_slots, nbytes, dtype=torch.uint8, pin_memory=pinned) for nbytes in view_bytes
        ]
        self._cuda, self._device = cuda, torch.device(device)
        self._own = threading.local()
        self._noted = cuda.Event()
        self.note()

    def views(self, layer: int, slot: int) -> list[torch.Tensor]:
        """See `Backing`."""
        return [memory[layer, slot] for memory in self._memory]

    def copy(self, slots: Sequence[Slot], targets: Sequence[Sequence[torch.Tensor]]) -> None:
        """See `Backing`. It follows what was launched before the last `note`, and delays nothing else."""
        stream = self._stream()
        with self._cuda.stream(stream):
            stream.wait_event(self._noted)
            try:
                for (layer, slot), views in zip(slots, targets, strict=True):
                    for target, source in zip(views, self.views(layer, slot), strict=True):
                        target.copy_(source, non_blocking=True)
            finally:  # also after a failure: somebody else may write there next
                stream.synchronize()

    @property
    def together(self) -> int:
        """See `Backing`. One copy takes all of the link."""
        return 1

    def _stream(self) -> Any:
        """One for each thread: a copy that is waited for does not stand behind one that is not."""
        stream = getattr(self._own, "stream", None)
        if stream is None:
            stream = self._own.stream = self._cuda.Stream(self._device)
        return stream

    def note(self) -> None:
        """See `Backing`."""
        self._noted.record(self._cuda.current_stream(self._device))

    def close(self) -> None:
        """See `Backing`."""
        self._memory = []
