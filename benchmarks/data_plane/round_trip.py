"""Dispatch and combine against a bare ping-pong of the same bytes on the same transport. Goal: at most 1.5 times.

    python -m benchmarks.data_plane.round_trip [--quick]

Both sides talk to the same number of shard processes on the same host and cores. The shards run the real compute loop
with an expert kernel that only copies rows, so the time covers everything but the experts: plan, pack, wire, request
check, reply, combine. The bare side copies a message of the same length in, posts it to every shard, waits for all, and
copies each answer out; its peers answer without reading. Runs are interleaved, and medians are compared.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.common import median, print_table, save
from experts.dispatch.dispatcher import Dispatcher
from experts.dispatch.layer_shape import LayerShape
from experts.native.library import data_plane
from experts.native.structs import NativeSlotWords
from experts.protocol.membership import Membership, ShardEndpoint, host_id
from experts.protocol.wire import HEADER_BYTES
from experts.shard.loop import ShardLoop
from experts.transports.connect import connect, open_shard_channel
from experts.transports.control import Hello
from experts.transports.control_port.listener import ControlListener
from experts.transports.shm import ShmDoorbell
from placement.placement import Placement

GOAL = 1.5
START_TIMEOUT_S = 300.0


class CopyKernel:
    """The cheapest expert kernel: every row is its own answer."""

    name = "copy"
    hints = None

    def __init__(self, row_bytes: int) -> None:
        self._row_bytes = ctypes.c_int64(row_bytes)

    def forward(
        self, layer: int, rows: torch.Tensor, offsets: Any, slots: Any, weights: Any, out: torch.Tensor
    ) -> None:
        """out = rows."""
        out.copy_(rows)

    def compiled_forward(self) -> tuple[int, int] | None:
        """The same in C++."""
        library = data_plane()
        if library is None:
            return None
        return library.data_plane_copy_rows_address(), ctypes.addressof(self._row_bytes)


def _shard(pipe: Connection, rank: int, shape: LayerShape, spin_us: float, bare_reply_bytes: int, core: int) -> None:
    """A shard process: the real loop with CopyKernel, or a peer that answers with `bare_reply_bytes` bytes."""
    os.sched_setaffinity(0, {core})
    bell = ShmDoorbell(spin_us)
    channels: list[Any] = []
    if bare_reply_bytes:
        listener = ControlListener(
            "127.0.0.1", lambda h, l: open_shard_channel(h, l, bell, "cpu", 0), channels.append, channels.remove, 10
        )
    else:
        slot_table = np.arange(shape.num_experts, dtype=np.int32)[None].repeat(shape.num_layers, 0)
        slots = SimpleNamespace(
            begin_request=lambda: None,
            end_request=lambda: None,
            slot_of_expert_LE=slot_table,
            words=NativeSlotWords(slot_of_expert_LE=slot_table.ctypes.data),
            checkpoint=SimpleNamespace(spec=SimpleNamespace(hidden_size=shape.hidden_size)),
        )
        loop = ShardLoop(slots, CopyKernel(shape.row_bytes), bell, shape.dtype, 1)  # type: ignore[arg-type]
        loop.start()
        listener = ControlListener(
            "127.0.0.1", lambda h, l: open_shard_channel(h, l, bell, "cpu", 0), loop.add, loop.remove, 10
        )
    pipe.send(ShardEndpoint(rank, "x", "127.0.0.1", listener.port, host_id(), os.getpid()))
    if not bare_reply_bytes:
        pipe.recv()
        return
    while not pipe.poll(0):
        if not bell.wait(0.2):
            continue
        for channel in channels:
            if channel.poll() >= 0:
                channel.reply(bare_reply_bytes)


def _start(shape: LayerShape, ranks: int, spin_us: float, bare_reply_bytes: int) -> tuple[list[Any], list[Any]]:
    context = multiprocessing.get_context("spawn")
    cores = sorted(os.sched_getaffinity(0))
    processes, endpoints = [], []
    for rank in range(ranks):
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_shard,
            args=(theirs, rank, shape, spin_us, bare_reply_bytes, cores[(rank + 1) % len(cores)]),
            daemon=True,
        )
        process.start()
        processes.append((process, ours))
    for _, pipe in processes:
        if not pipe.poll(START_TIMEOUT_S):
            raise TimeoutError(f"a shard process did not report its endpoint within {START_TIMEOUT_S:.0f} s")
        endpoints.append(pipe.recv())
    return processes, endpoints


def measure(tokens: int, ranks: int, dtype: torch.dtype, spin_us: float, turns: int) -> dict[str, Any]:
    """One row: medians over all round trips of both sides, whose turns are interleaved."""
    shape = LayerShape(num_layers=1, num_experts=64, top_k=8, hidden_size=512, dtype=dtype)
    row_bytes = shape.row_bytes
    hello = Hello("bench", "shm", "x", str(dtype).removeprefix("torch."), 512, 8, 1, tokens)
    placement = Placement.linear(1, 64, ranks)
    meshed, endpoints = _start(shape, ranks, spin_us, 0)
    dispatcher = Dispatcher(shape, tokens, 30.0, fallback=None)
    links = {e.rank: connect(e, hello, "cpu", spin_us, time.monotonic() + 30) for e in endpoints}
    dispatcher.apply(Membership(1, placement, tuple(endpoints)), links, {})
    x_TD = torch.randn(tokens, 512).to(dtype)
    ids_TK = torch.stack([torch.randperm(64)[:8] for _ in range(tokens)]).int()
    weights_TK = torch.rand(tokens, 8)
    pending = dispatcher.begin(0, x_TD, weights_TK, ids_TK)
    request_bytes = pending.plan.nbytes_R.tolist()
    reply_bytes = [HEADER_BYTES + int(rows) * row_bytes for rows in pending.plan.rows_R]
    dispatcher.finish(pending)
    bare, bare_endpoints = _start(shape, ranks, spin_us, max(reply_bytes))
    bare_links = [connect(e, hello, "cpu", spin_us, time.monotonic() + 30) for e in bare_endpoints]
    payload = np.random.default_rng(0).integers(0, 255, max(request_bytes), np.uint8)
    landing = np.empty(max(reply_bytes), np.uint8)

    def ping_pong() -> None:
        for link, nbytes in zip(bare_links, request_bytes, strict=True):
            link.send_buffer[:nbytes] = payload[:nbytes]
            link.post(nbytes)
        until_s = time.monotonic() + 30
        for link, nbytes in zip(bare_links, reply_bytes, strict=True):
            link.wait(until_s)
            landing[:nbytes] = link.recv_buffer[:nbytes]

    times: dict[str, list[float]] = {"mesh": [], "bare": []}
    for _ in range(turns):
        for name, call in (
            ("mesh", lambda: dispatcher.forward(0, x_TD, weights_TK, ids_TK)),
            ("bare", ping_pong),
        ):
            for _ in range(200):
                start = time.perf_counter()
                call()
                times[name].append((time.perf_counter() - start) * 1e6)
    for process, pipe in [*meshed, *bare]:
        pipe.send("end")
        process.join(10)
        process.kill()
    result = {
        "transport": "shm",
        "dtype": hello.dtype,
        "tokens": tokens,
        "shards": ranks,
        "kbytes": sum(request_bytes + reply_bytes) / 1000,
        "mesh_us": median(times["mesh"]),
        "bare_us": median(times["bare"]),
    }
    return {**result, "ratio": result["mesh_us"] / result["bare_us"], "goal": GOAL}


def main() -> None:
    """Print the table and write bench-results/round_trip.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--spin-us", type=float, default=50.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    turns = 3 if args.quick else 15
    cases = [(64, 2, torch.bfloat16), (64, 2, torch.float32), (1, 2, torch.bfloat16), (64, 4, torch.bfloat16)]
    rows = [measure(tokens, ranks, dtype, args.spin_us, turns) for tokens, ranks, dtype in cases]
    print_table(
        "Dispatch and combine against a bare ping-pong of the same bytes",
        list(rows[0]),
        [list(r.values()) for r in rows],
    )
    save("round_trip", {"rows": rows, "spin_us": args.spin_us})


if __name__ == "__main__":
    main()
