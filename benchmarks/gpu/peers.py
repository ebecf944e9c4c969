"""Shard processes on GPUs for the benchmarks of pairs: the real compute loop, a bare peer, and a pair between shards.

They use NCCL or CUDA IPC; a rehearsal on the CPU uses the stand-ins, gloo or host memory with rows apart from messages.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.distributed import FileStore

from benchmarks.gpu.common import wall_us
from experts.dispatch.dispatcher import Dispatcher
from experts.dispatch.layer_shape import LayerShape
from experts.protocol.membership import Membership, ShardEndpoint, host_id
from experts.shard.loop import ShardLoop
from experts.transports.connect import connect, open_shard_channel
from experts.transports.control import Hello
from experts.transports.control_port.listener import ControlListener
from experts.transports.devices import identity_of
from experts.transports.nccl_sharing import SHARE_GPUS, spread
from experts.transports.shm import ShmDoorbell
from experts.transports.torch_groups import GlooGroup, NcclGroup, PairGroup
from placement.placement import Placement

LIMIT_S = 120.0


class CopyKernel:
    """The cheapest expert kernel: every row is its own answer."""

    name = "copy"
    hints = None

    def forward(
        self, layer: int, rows: torch.Tensor, offsets: Any, slots: Any, weights: Any, out: torch.Tensor
    ) -> None:
        """out = rows."""
        out.copy_(rows)

    def compiled_forward(self) -> None:
        """Python calls it."""


def make_group(device: str, folder: str, name: str, rank: int) -> PairGroup:
    """One end of a pair; both ends meet in a file."""
    store = FileStore(str(Path(folder) / name), 2)
    if device == "cpu":
        return GlooGroup(store, rank, "127.0.0.1", LIMIT_S)
    return NcclGroup(store, rank, device, LIMIT_S, lambda: None)


def wait(group: PairGroup, work: Any) -> None:
    """Wait for a transfer, for at most LIMIT_S."""
    group.wait(work, time.monotonic() + LIMIT_S)


class _Peer:
    """A shard process's work beside its loop, one order at a time."""

    def __init__(self, device: str, folder: str) -> None:
        self._device = device
        self._folder = folder
        self._groups: dict[str, PairGroup] = {}
        self._stop = threading.Event()

    def pair(self, name: str, rank: int) -> None:
        """Connect to the other end."""
        self._groups[name] = make_group(self._device, self._folder, name, rank)

    def bare(self, name: str, request_bytes: int, reply_bytes: int, count: int) -> None:
        """Answer `count` messages without reading them."""
        group = self._groups[name]
        message, reply = (torch.zeros(n, dtype=torch.uint8, device=self._device) for n in (request_bytes, reply_bytes))
        for _ in range(count):
            wait(group, group.recv(message))
            wait(group, group.send(reply))

    def copy(self, name: str, nbytes: int, count: int, sends: bool) -> list[float]:
        """Send or receive `nbytes` `count` times, each acknowledged by a small message; microseconds of each."""
        group = self._groups[name]
        weights = torch.zeros(nbytes, dtype=torch.uint8, device=self._device)
        token = torch.zeros(16, dtype=torch.uint8, device=self._device)

        def once() -> None:
            wait(group, group.send(weights) if sends else group.recv(weights))
            wait(group, group.recv(token) if sends else group.send(token))

        return wall_us(once, self._device, count)


def _shard(pipe: Connection, rank: int, device: str, shape: LayerShape, folder: str) -> None:
    """Process body: the loop in its thread; orders (a method of _Peer, its arguments) here, until "end"."""
    torch.set_num_threads(1)
    if device != "cpu":
        torch.cuda.set_device(device)
    bell = ShmDoorbell(50.0)
    slots = SimpleNamespace(
        begin_request=lambda: None,
        end_request=lambda: None,
        slot_of_expert_LE=np.arange(shape.num_experts, dtype=np.int32)[None].repeat(shape.num_layers, 0),
        checkpoint=SimpleNamespace(spec=SimpleNamespace(hidden_size=shape.hidden_size)),
    )
    loop = ShardLoop(slots, CopyKernel(), bell, shape.dtype, 1, device=device)  # type: ignore[arg-type]
    loop.start()
    listener = ControlListener(
        "127.0.0.1",
        lambda hello, line: open_shard_channel(hello, line, bell, device, time.monotonic() + LIMIT_S),
        loop.add,
        loop.remove,
        LIMIT_S,
    )
    here = (host_id(), os.getpid(), identity_of(device))
    pipe.send(ShardEndpoint(rank, "x", "127.0.0.1", listener.port, *here))
    peer = _Peer(device, folder)
    while (order := pipe.recv()) != "end":
        name, *values = order
        try:
            pipe.send(getattr(peer, name)(*values))
        except Exception as error:
            pipe.send(error)


@dataclass
class Pool:
    """Running shards, with this process as their router."""

    device: str
    folder: str
    shape: LayerShape
    shard_devices: list[str]
    endpoints: list[ShardEndpoint] = field(default_factory=list)
    pipes: list[Connection] = field(default_factory=list)

    def order(self, rank: int, name: str, *values: Any) -> None:
        """Give a shard an order; a call of `answer` must follow."""
        self.pipes[rank].send((name, *values))

    def answer(self, rank: int) -> Any:
        """The result of the last order; raises its exception, or TimeoutError."""
        if not self.pipes[rank].poll(LIMIT_S):
            raise TimeoutError(f"shard {rank} did not answer within {LIMIT_S:.0f} s")
        found = self.pipes[rank].recv()
        if isinstance(found, Exception):
            raise found
        return found

    @property
    def transports(self) -> tuple[str, str]:
        """Over NCCL and over CUDA IPC, or what stands in for them."""
        return ("gloo_split", "shm_split") if self.device == "cpu" else ("nccl", "cuda_ipc")

    def dispatcher(self, max_rows: int, transport: str) -> Dispatcher:
        """A dispatcher connected to all shards, with a linear placement."""
        shape, num_ranks = self.shape, len(self.endpoints)
        hello = Hello(
            "bench", transport, "x",
            str(shape.dtype).removeprefix("torch."), shape.hidden_size, shape.top_k, shape.num_layers,
            max_rows,
        )  # fmt: skip
        links = {e.rank: connect(e, hello, self.device, 50.0, time.monotonic() + LIMIT_S) for e in self.endpoints}
        dispatcher = Dispatcher(shape, max_rows, LIMIT_S, None)
        placement = Placement.linear(shape.num_layers, shape.num_experts, num_ranks)
        dispatcher.apply(Membership(1, placement, tuple(self.endpoints)), links, {})
        return dispatcher


@contextlib.contextmanager
def pool(device: str, num_shards: int, shape: LayerShape) -> Iterator[Pool]:
    """Running shards, ended with the context. Raises ValueError without a GPU."""
    os.environ[SHARE_GPUS] = "1"  # here and in the shards
    router_device, devices = ("cpu", ["cpu"] * num_shards) if device == "cpu" else spread(num_shards)
    context = multiprocessing.get_context("spawn")
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        found = Pool(router_device, folder, shape, devices)
        try:
            for rank, shard_device in enumerate(devices):
                ours, theirs = context.Pipe()
                process = context.Process(target=_shard, args=(theirs, rank, shard_device, shape, folder), daemon=True)
                process.start()
                processes.append(process)
                found.pipes.append(ours)
            found.endpoints += [found.answer(rank) for rank in range(num_shards)]
            yield found
        finally:
            for pipe in found.pipes:
                with contextlib.suppress(OSError):
                    pipe.send("end")
            for process in processes:
                process.join(10)
                process.kill()
