"""Shards of a fixed-capacity exchange, each in its own process: expert e multiplies its input by e + 1."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed import FileStore

from experts.dispatch.captured.fixed_dispatch import FixedMessage, MessageLayout
from experts.transports.torch_groups import ROUTER, SHARD, GlooGroup, NcclGroup, PairGroup
from tests.support.small_mesh import forked_context
from tests.support.waiting import AWAIT_S


def make_group(kind: str, folder: Path, peer: int, rank: int, device: str) -> PairGroup:
    """One end of the pair with shard `peer`."""
    store = FileStore(str(folder / f"pair-{peer}"), 2)
    if kind == "nccl":
        return NcclGroup(store, rank, device, AWAIT_S, lambda: None)
    return GlooGroup(store, rank, "127.0.0.1", AWAIT_S)


def scale_rows(message: FixedMessage, out_MD: torch.Tensor) -> None:
    """What a shard computes."""
    scale_N = message.weights_N * (message.experts_N + 1)
    row_N = torch.repeat_interleave(torch.arange(len(out_MD)), message.row_offsets_M1.diff().long())
    scale_M1 = torch.zeros(len(out_MD)).index_add_(0, row_N, scale_N)[:, None]
    out_MD.copy_(message.rows_MD * scale_M1.to(out_MD.device))


def serve(
    kind: str, folder: Path, peer: int, device: str, layout: MessageLayout, dtype: str, silent: bool, pipe: Any
) -> None:
    """Process body: answer until killed, or never if `silent`."""
    from experts.dispatch.captured.exchange import FixedPeer

    group = make_group(kind, folder, peer, SHARD, device)
    shard = FixedPeer(group, layout, getattr(torch, dtype), torch.device(device))
    pipe.send("ready")
    while not pipe.poll(AWAIT_S if silent else 0):
        with contextlib.suppress(TimeoutError):
            if not silent:
                shard.serve(scale_rows, time.monotonic() + AWAIT_S)


@contextlib.contextmanager
def peers(
    kind: str,
    folder: Path,
    router_device: str,
    devices: list[str],
    layout: MessageLayout,
    dtype: torch.dtype,
    silent: int = -1,
) -> Iterator[list[PairGroup]]:
    """The router's groups, one a shard; kills the shards' processes at the end. Shard `silent` never answers."""
    name = str(dtype).removeprefix("torch.")
    running: list[tuple[Any, Any]] = []
    groups: list[PairGroup] = []
    try:
        for peer, device in enumerate(devices):
            ours, theirs = multiprocessing.Pipe()
            arguments = (kind, folder, peer, device, layout, name, peer == silent, theirs)
            process = forked_context().Process(target=serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            running.append((process, ours))
        for peer, (_, pipe) in enumerate(running):
            groups.append(make_group(kind, folder, peer, ROUTER, router_device))
            assert pipe.poll(AWAIT_S), f"shard {peer} did not start"
        yield groups
    finally:
        for group in groups:
            group.abort()
        for process, pipe in running:
            process.kill()
            process.join(AWAIT_S)
            pipe.close()
