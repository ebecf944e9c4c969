"""Dispatch and combine over NCCL and over CUDA IPC against a bare NCCL send and receive of the same bytes. Goal: 1.3
times.

    python -m benchmarks.gpu.round_trip [--quick] [--device cpu]

Shards are processes that run the real loop with an expert kernel that only copies rows, so the time covers everything
but the experts. The bare side sends each shard as many bytes, receives as many, and waits for all; its peers answer
without reading. Turns are interleaved, and medians are compared. Ranks that share a GPU take turns on it and may talk
over sockets: their figures compare the two sides only, not links between GPUs.

The last columns are memory of the router's GPU that a pair took, and what a router has vLLM leave for one. Shards on
that GPU count, too, so look at those of a router with a GPU of its own.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.common import median, percentile
from benchmarks.gpu.common import Report, arguments
from benchmarks.gpu.peers import LIMIT_S, Pool, make_group, pool
from experts.dispatch.layer_shape import LayerShape
from experts.transports.device_memory import pair_device_bytes
from experts.transports.torch_groups import ROUTER, SHARD, PairGroup

GOAL = 1.3


def dispatch_us(forward: Any, count: int, device: str) -> list[float]:
    """Microseconds of each of `count` layers, until the device has the result."""
    times = []
    for _ in range(count):
        start_s = time.perf_counter()
        forward()
        if device != "cpu":
            torch.cuda.current_stream().synchronize()
        times.append((time.perf_counter() - start_s) * 1e6)
    return times


def taken_bytes(device: str) -> int:
    """Of the whole GPU, whoever has taken them."""
    if device == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


class BareSide:
    """The router's end of the bare exchange."""

    def __init__(self, peers: Pool, message_bytes: list[int], name: str) -> None:
        self._peers = peers
        self._name = name  # two ends can meet in a file only once
        self._ranks = [rank for rank, nbytes in enumerate(message_bytes) if nbytes]
        self._groups: dict[int, PairGroup] = {}
        for rank in self._ranks:
            peers.order(rank, "pair", f"{self._name}-{rank}", SHARD)
            self._groups[rank] = make_group(peers.device, peers.folder, f"{self._name}-{rank}", ROUTER)
            peers.answer(rank)
        self._bytes = message_bytes
        self._out, self._into = (
            {rank: torch.zeros(message_bytes[rank], dtype=torch.uint8, device=peers.device) for rank in self._ranks}
            for _ in range(2)
        )

    def turn(self, count: int) -> list[float]:
        """Microseconds of each of `count` round trips."""
        for rank in self._ranks:
            self._peers.order(rank, "bare", f"{self._name}-{rank}", self._bytes[rank], self._bytes[rank], count)
        times = dispatch_us(self._round_trip, count, self._peers.device)
        for rank in self._ranks:
            self._peers.answer(rank)
        return times

    def _round_trip(self) -> None:
        groups = self._groups
        sent = [groups[rank].send(self._out[rank]) for rank in self._ranks]
        works = [groups[rank].recv(self._into[rank]) for rank in self._ranks]
        until_s = time.monotonic() + LIMIT_S
        for rank, work in zip(self._ranks, works, strict=True):
            groups[rank].wait(work, until_s)
        del sent


def measure(peers: Pool, transport: str, num_tokens: int, turns: int, count: int) -> dict[str, Any]:
    """One row of the table."""
    shape = peers.shape
    before_bytes = taken_bytes(peers.device)
    dispatcher = peers.dispatcher(num_tokens, transport)
    pair_bytes = (taken_bytes(peers.device) - before_bytes) / len(dispatcher.links)
    x_TD = torch.randn(num_tokens, shape.hidden_size).to(peers.device, shape.dtype)
    ids_TK = torch.rand(num_tokens, shape.num_experts).argsort(1)[:, : shape.top_k].int().to(peers.device)
    weights_TK = torch.rand(num_tokens, shape.top_k).to(peers.device)

    def forward() -> torch.Tensor:
        return dispatcher.forward(0, x_TD, weights_TK, ids_TK)

    try:
        pending = dispatcher.begin(0, x_TD, weights_TK, ids_TK)
        row_bytes = [int(rows) * shape.row_bytes for rows in pending.plan.rows_R]
        dispatcher.finish(pending)
        bare_side = BareSide(peers, row_bytes, f"bare-{transport}-{num_tokens}")
        mesh: list[float] = []
        bare: list[float] = []
        for turn in range(turns + 1):
            there, bare_there = dispatch_us(forward, count, peers.device), bare_side.turn(count)
            if turn:  # the first turn warms up
                mesh += there
                bare += bare_there
        if dispatcher.lost:
            raise RuntimeError(f"shards were lost: {dispatcher.lost}")
    finally:
        dispatcher.close()
    return {
        "transport": transport,
        "tokens": num_tokens,
        "shards": len(row_bytes),
        "MB each way": sum(row_bytes) / 1e6,
        "mesh_us": median(mesh),
        "mesh p99": percentile(mesh, 0.99),
        "bare_us": median(bare),
        "bare p99": percentile(bare, 0.99),
        "ratio": median(mesh) / median(bare),
        "goal": GOAL,
        "MB a pair": pair_bytes / 1e6,
        "MB reserved": pair_device_bytes(transport, num_tokens, shape.top_k, shape.row_bytes) / 1e6,
    }


def main() -> None:
    """Print the table."""
    args = arguments(__doc__)
    on_cpu = args.device == "cpu"
    report = Report("gpu_round_trip", args.device)
    shape = LayerShape(1, 16, 4, 64, torch.float32) if on_cpu else LayerShape(1, 256, 8, 7168, torch.bfloat16)
    turns, count = (1, 3) if on_cpu else (2, 50) if args.quick else (8, 100)
    rows = []
    for num_shards in (2,) if on_cpu else (1, 2, 4):
        try:
            with pool(args.device, num_shards, shape) as peers:
                for transport in peers.transports:
                    sizes = (1, 5) if on_cpu else (1, 64, 256)
                    rows += [measure(peers, transport, tokens, turns, count) for tokens in sizes]
                places = sorted({peers.device, *peers.shard_devices})
                print(f"1 router and {num_shards} shards on {', '.join(places)}")
        except (ValueError, RuntimeError, OSError, TimeoutError) as error:
            report.leave_out(f"{num_shards} shards", f"{type(error).__name__}: {error}")
    report.table(f"Dispatch and combine against bare sends and receives, hidden {shape.hidden_size}", rows)
    report.end()


if __name__ == "__main__":
    main()
