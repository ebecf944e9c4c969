"""Rows a second of one shard that serves several routers, one after the other and together. Goal: twice as many.

    python -m benchmarks.data_plane.many_routers [--quick]

Eight routers, threads that wait without the GIL, each send 8 rows, wait for the answer, and go on to the next layer: no
two are in step unless the shard brings them there. The shard computes with the native kernel, 64 experts of hidden size
512 and width 256, top-8, float32. "apart" answers each request by itself, in Python; "together" is what shards do.
Turns are interleaved. p99 is of all requests, and of the router that has the worst.
"""

from __future__ import annotations

import argparse
import socket
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.common import median, print_table, save
from experts.dispatch.layer_shape import LayerShape
from experts.dispatch.loopback import loopback_dispatcher
from experts.kernels import KernelShape
from experts.kernels.native.kernel import NativeKernel
from experts.model.spec import ActivationSpec, ExpertWeights
from experts.native.structs import NativeSlotWords
from experts.protocol.wire import H_LAYER, H_SEQ, HEADER_BYTES, header_of, reply_capacity, request_capacity
from experts.shard.loop import ShardLoop
from experts.transports.control import LifeLine
from experts.transports.shared_region import FdMailbox
from experts.transports.shm import ShmDoorbell, ShmRouterLink, ShmShardChannel

GOAL = 2.0
SHAPE = LayerShape(num_layers=2, num_experts=64, top_k=8, hidden_size=512, dtype=torch.float32)
WIDTH, NUM_ROUTERS, BATCH, SPIN_US = 256, 8, 8, 50.0


def make_kernel() -> NativeKernel:
    """Random weights in all slots."""
    shape = KernelShape(SHAPE.num_layers, SHAPE.num_experts, SHAPE.hidden_size, WIDTH, ActivationSpec("silu"))
    kernel = NativeKernel(shape)
    weights = ExpertWeights(torch.randn(2 * WIDTH, SHAPE.hidden_size) / 30, torch.randn(SHAPE.hidden_size, WIDTH) / 30)
    for layer in range(SHAPE.num_layers):
        for slot in range(SHAPE.num_experts):
            kernel.set_slot(layer, slot, weights)
    return kernel


def make_pair(rank: int, bell: ShmDoorbell) -> tuple[ShmRouterLink, ShmShardChannel]:
    """Both ends of a pair."""
    ours, theirs = socket.socketpair()
    mailbox = FdMailbox()
    sizes = request_capacity(BATCH, SHAPE.top_k, SHAPE.row_bytes), reply_capacity(BATCH, SHAPE.row_bytes)
    channel = ShmShardChannel(f"router-{rank}", mailbox.name, bell, *sizes, LifeLine(theirs))
    bell_fd, pair_fd = mailbox.receive(time.monotonic() + 30)
    mailbox.close()
    return ShmRouterLink.attach(rank, (bell_fd, pair_fd), *sizes, SPIN_US, LifeLine(ours)), channel


def packed_request(seed: int) -> np.ndarray:
    """A request for BATCH rows, as a router packs it."""
    generator = torch.Generator().manual_seed(seed)
    dispatcher = loopback_dispatcher(SHAPE, 1, BATCH)
    ids_TK = torch.stack([torch.randperm(64, generator=generator)[: SHAPE.top_k] for _ in range(BATCH)]).int()
    x_TD = torch.randn(BATCH, SHAPE.hidden_size, generator=generator)
    pending = dispatcher.begin(0, x_TD, torch.full(ids_TK.shape, 1 / SHAPE.top_k), ids_TK)
    dispatcher.finish(pending)
    return dispatcher.links[0].send_buffer[: int(pending.plan.nbytes_R[0])].copy()


class Side:
    """A shard and its routers."""

    def __init__(self, kernel: NativeKernel, together: bool, requests: list[np.ndarray]) -> None:
        slot_table = np.arange(SHAPE.num_experts, dtype=np.int32)[None].repeat(SHAPE.num_layers, 0)
        slots = SimpleNamespace(
            begin_request=lambda: None,
            end_request=lambda: None,
            slot_of_expert_LE=slot_table,
            words=NativeSlotWords(slot_of_expert_LE=slot_table.ctypes.data),
            checkpoint=SimpleNamespace(spec=SimpleNamespace(hidden_size=SHAPE.hidden_size)),
        )
        bell = ShmDoorbell(SPIN_US)
        self.loop = ShardLoop(slots, kernel, bell, SHAPE.dtype, 1, together)  # type: ignore[arg-type]
        self.pairs = [make_pair(rank, bell) for rank in range(NUM_ROUTERS)]
        self.requests = requests
        for _, channel in self.pairs:
            self.loop.add(channel)
        self.loop.start()

    def turn(self, seconds: float) -> list[list[float]]:
        """Milliseconds of each request, by router, while all of them send for so long."""
        times: list[list[float]] = [[] for _ in self.pairs]
        stop_s = time.perf_counter() + seconds
        threads = [threading.Thread(target=self._route, args=(i, stop_s, times[i])) for i in range(NUM_ROUTERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return times

    def _route(self, number: int, stop_s: float, times: list[float]) -> None:
        link, request = self.pairs[number][0], self.requests[number]
        link.send_buffer[: len(request)] = request
        header = header_of(link.send_buffer)
        step = number
        while (start_s := time.perf_counter()) < stop_s:
            step += 1
            header[H_LAYER], header[H_SEQ] = step % SHAPE.num_layers, step
            link.post(len(request))
            nbytes = link.wait(time.monotonic() + 60)
            assert nbytes == HEADER_BYTES + BATCH * SHAPE.row_bytes
            times.append((time.perf_counter() - start_s) * 1e3)


def main() -> None:
    """Print the table and write bench-results/many_routers.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kernel = make_kernel()
    requests = [packed_request(seed) for seed in range(NUM_ROUTERS)]
    rows: list[dict[str, Any]] = []
    turns, seconds = (3, 1.0) if args.quick else (9, 2.0)
    rates: dict[str, list[float]] = {"apart": [], "together": []}
    times: dict[str, list[list[float]]] = {name: [[] for _ in range(NUM_ROUTERS)] for name in rates}
    for _ in range(turns):
        for name in rates:
            side = Side(kernel, name == "together", requests)
            found = side.turn(seconds)
            side.loop.stop()
            rates[name].append(sum(map(len, found)) * BATCH / seconds)
            for kept, new in zip(times[name], found, strict=True):
                kept += new
    for name in rates:
        each = [float(np.percentile(router, 99)) for router in times[name]]
        of_all = [value for router in times[name] for value in router]
        rows.append(
            {
                "requests": name,
                "rows_per_s": median(rates[name]),
                "median_ms": median(of_all),
                "p99_ms": float(np.percentile(of_all, 99)),
                "worst_router_p99_ms": max(each),
                "ratio": median(rates[name]) / median(rates["apart"]),
                "goal": GOAL if name == "together" else "-",
            }
        )
    print_table("One shard, eight routers of batch 8", list(rows[0]), [list(row.values()) for row in rows])
    save("many_routers", {"rows": rows, "turns": turns, "seconds_a_turn": seconds})


if __name__ == "__main__":
    main()
