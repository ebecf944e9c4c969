"""The compute loop in C++ (native/shard.h): from the bell to the reply without Python, where the kernel is C++ too."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch

from experts.kernels import ExpertKernel
from experts.native.library import data_plane
from experts.native.structs import NativeShard, NativeShardCounts
from experts.protocol.wire import DTYPE_CODES
from experts.shard.slots import SlotTable
from experts.shard.turns import MAX_PASSED_OVER
from experts.transports.base import Doorbell, ShardChannel
from experts.transports.shm import ShmDoorbell

# A router's request waits for at most so many rows of other routers that share its call of the kernel.
MAX_MERGED_ROWS = 256
NOTHING, SERVED = -1, -2  # shard.h

Views = TypeVar("Views")


class CompiledLoop:
    """What C++ needs of a shard. One thread calls `begin` and `serve`; any thread, `call`."""

    def __init__(self, shard: NativeShard, bell: ShmDoorbell, kernel: ExpertKernel, keep: Iterable[object]) -> None:
        """`keep` is what the addresses in `shard` point to, besides `bell` and `kernel`."""
        library = data_plane()
        assert library is not None, "compiled_loop asks first"
        self._serve, self._shard, self._bell, self._kernel = library.data_plane_serve, shard, bell, kernel
        self._keep = tuple(keep)
        self._address = ctypes.addressof(shard)
        self._seen: Mapping[ShardChannel, object] | None = None
        self.channels: list[ShardChannel] = []
        """Those that C++ serves."""
        self._table = (ctypes.c_void_p * 0)()

    def call(self) -> None:
        """Have `serve` return soon; the caller rings the bell afterwards."""
        self._shard.attention = 1

    def attend(self) -> None:
        """Calls so far are heeded: what they are about is read after this."""
        self._shard.attention = 0

    def begin(self, channels: Mapping[ShardChannel, Views]) -> dict[ShardChannel, Views]:
        """Serve these channels from now on (a mapping that is replaced, not changed); returns those left to Python."""
        if channels is not self._seen:
            self._seen = channels
            self._shard.sockets = self._bell.native_sockets  # there since the first channel that is a socket was opened
            self.channels = [channel for channel in channels if channel.native is not None]
            self._shard.has_deferred = any(channel.deferred for channel in self.channels)
            self._table = (ctypes.c_void_p * len(self.channels))(
                *(ctypes.addressof(channel.native) for channel in self.channels if channel.native is not None)
            )
            self._by_python = {channel: views for channel, views in channels.items() if channel.native is None}
        return self._by_python  # type: ignore[return-value]

    def serve(self, timeout_s: float) -> int:
        """Answer requests for up to `timeout_s`, with 0 one batch at most.

        Returns the index of a channel whose request is Python's to answer, NOTHING, or SERVED (with 0, or after the
        kernel was made ready for a request).
        """
        index = int(self._serve(self._address, self._table, len(self.channels), int(timeout_s * 1e9)))
        if index >= 0 and self._kernel.make_ready():
            try:
                index = int(self._serve(self._address, self._table, len(self.channels), 0))
            finally:
                self._kernel.end_ready()
        return index


def compiled_loop(
    slots: SlotTable,
    kernel: ExpertKernel,
    bell: Doorbell,
    dtype: torch.dtype,
    num_threads: int,
    top_k: int | None,
    counts: NativeShardCounts,
) -> CompiledLoop | None:
    """The loop in C++, or None where the kernel, the doorbell or the machine has no compiled form."""
    compiled = kernel.compiled_forward()
    if compiled is None or data_plane() is None or not isinstance(bell, ShmDoorbell):
        return None
    num_layers, num_experts = slots.slot_of_expert_LE.shape
    shard = NativeShard(
        num_layers=num_layers,
        num_experts=num_experts,
        hidden=slots.checkpoint.spec.hidden_size,
        dtype=DTYPE_CODES[dtype],
        forward=compiled[0],
        kernel=compiled[1],
        threads=num_threads,
        max_merged_rows=MAX_MERGED_ROWS,
        max_passed_over=MAX_PASSED_OVER,
        slots=ctypes.addressof(slots.words),
        counts=ctypes.addressof(counts),
        bell=bell.region.address,
        spin_ns=bell.spin_ns,
        top_k=top_k or 0,
        hints=None if kernel.hints is None else ctypes.addressof(kernel.hints),
    )
    return CompiledLoop(shard, bell, kernel, (slots, counts))
