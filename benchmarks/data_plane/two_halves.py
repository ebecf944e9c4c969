"""Tokens a second of one router against two that share its core, each with half of the batch: who waits for the shard?

    python -m benchmarks.data_plane.two_halves [--quick]

A router computes while its shard idles, and the other way round. Two halves of a batch in flight fill each other's
waits. Here a router is a process that multiplies matrices in each layer, as the dense half would, and dispatches to one
shard. The shard's kernel is slowed by hand: it sleeps instead of computing, as a GPU works beside the cores, a time for
each row, as where products take the time, or one for each request however many rows it has, as where reading weights
does. Both routers stay connected; sides take turns. "bound": one router's time over the longer of what the core
computes and what the shard sleeps for both halves.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.common import TINY_MODEL, median, print_table, save

BATCH = 64
# Of the shard, for a request of BATCH rows: (name, microseconds a request, microseconds a row)
SPEEDS = (
    ("not at all", 0, 0.0),
    ("by rows", 0, 1000 / BATCH),
    ("by rows, more", 0, 4000 / BATCH),
    ("by both", 500, 500 / BATCH),
    ("by requests", 1000, 0.0),
)
WIDTH = 768  # of the matrices that stand for attention


def serve(pipe: Connection, core: int, request_us: Any, row_us: Any) -> None:
    """The shard's process, until the pipe says so."""
    os.sched_setaffinity(0, {core})
    from experts.checkpoint import ExpertCheckpoint
    from experts.protocol.settings import ShardSettings
    from experts.shard import server
    from placement.placement import Placement

    pick = server.pick_kernel

    def pick_slow(*arguments: Any) -> Any:
        kernel: Any = pick(*arguments)

        def slow(layer: int, rows_MD: torch.Tensor, *rest: torch.Tensor) -> None:
            time.sleep((request_us.value + row_us.value * len(rows_MD)) / 1e6)
            rest[-1].zero_()

        kernel.forward, kernel.compiled_forward = slow, lambda: None
        return kernel

    server.pick_kernel = pick_slow
    spec = ExpertCheckpoint.open(TINY_MODEL).spec
    shard = server.ShardServer(ShardSettings(model_path=str(TINY_MODEL), dtype="float32"))
    shard.start(placement := Placement.linear(spec.num_layers, spec.num_experts, 1), 0, 1)
    from experts.protocol.membership import Membership

    pipe.send(Membership(1, placement, (shard.endpoint,)).to_dict())
    pipe.recv()
    shard.stop()


def route(pipe: Connection, core: int, membership: dict[str, Any]) -> None:
    """A router's process: gets (rows, seconds), answers (tokens/s, microseconds of a layer, of its dense half)."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    from experts.checkpoint import ExpertCheckpoint
    from experts.dispatch.layer_shape import LayerShape
    from experts.dispatch.mesh_client import MeshClient
    from experts.protocol.settings import RouterSettings

    checkpoint = ExpertCheckpoint.open(TINY_MODEL)
    spec = checkpoint.spec
    shape = LayerShape(spec.num_layers, spec.num_experts, spec.top_k, spec.hidden_size, torch.float32)
    settings = RouterSettings(model_path=str(TINY_MODEL), membership=membership, trace_tokens=0)
    client = MeshClient(settings, checkpoint, shape, "cpu")
    client.attach_static()
    up, down = torch.randn(shape.hidden_size, WIDTH) / 16, torch.randn(WIDTH, shape.hidden_size) / 23
    pipe.send("ready")
    with torch.inference_mode():
        while (order := pipe.recv()) is not None:
            rows, seconds = order
            generator = torch.Generator().manual_seed(rows)
            x_TD = torch.randn(rows, shape.hidden_size, generator=generator)
            ids_TK = torch.rand(rows, shape.num_experts, generator=generator).topk(shape.top_k).indices.int()
            weights_TK = torch.full(ids_TK.shape, 1 / shape.top_k)
            steps, dense_s, start_s = 0, 0.0, time.perf_counter()
            while time.perf_counter() < start_s + seconds:
                for layer in range(shape.num_layers):
                    before_s = time.perf_counter()
                    h_TD = torch.relu(x_TD @ up) @ down
                    dense_s += time.perf_counter() - before_s
                    client.finish(client.begin(layer, h_TD, weights_TK, ids_TK))
                steps += 1
            took_s, layers = time.perf_counter() - start_s, steps * shape.num_layers
            pipe.send((steps * rows / took_s, took_s / layers * 1e6, dense_s / layers * 1e6))
    client.close()


def run(routers: list[Connection], rows: int, seconds: float) -> tuple[float, float, float]:
    """(tokens/s of all routers together, microseconds of a layer of the first one, of its dense half)."""
    for router in routers:
        router.send((rows, seconds))
    answers = [router.recv() for router in routers]
    return sum(rate for rate, _, _ in answers), answers[0][1], answers[0][2]


def main() -> None:
    """Print the table and write bench-results/two_halves.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    turns, seconds = (3, 0.6) if args.quick else (9, 1.0)
    cores = sorted(os.sched_getaffinity(0))
    spawn = multiprocessing.get_context("spawn")
    request_us, row_us = spawn.Value("d", 0.0), spawn.Value("d", 0.0)
    shard, theirs = spawn.Pipe()
    processes = [spawn.Process(target=serve, args=(theirs, cores[-1], request_us, row_us), daemon=True)]
    processes[0].start()
    theirs.close()
    membership = shard.recv()
    routers = []
    for _ in range(2):
        ours, theirs = spawn.Pipe()
        processes.append(spawn.Process(target=route, args=(theirs, cores[0], membership), daemon=True))
        processes[-1].start()
        theirs.close()
        routers.append(ours)
    for router in routers:
        router.recv()
    run(routers, BATCH // 2, 0.2)
    rows = []
    for name, of_request, of_row in SPEEDS:
        request_us.value, row_us.value = float(of_request), of_row
        ones, twos = [], []
        for _ in range(turns):
            ones.append(run(routers[:1], BATCH, seconds))
            twos.append(run(routers, BATCH // 2, seconds))
        one, layer_us, dense_us = (median(values) for values in zip(*ones, strict=True))
        two = median(rate for rate, _, _ in twos)
        half_us = of_request + of_row * BATCH / 2
        rows.append(
            {
                "slowed": name,
                "shard_us_64_rows": of_request + of_row * BATCH,
                "shard_us_32_rows": half_us,
                "dense_us_64_rows": dense_us,
                "one_tokens_per_s": one,
                "two_tokens_per_s": two,
                "ratio": two / one,
                "bound": layer_us / max(dense_us, 2 * half_us),
            }
        )
    for pipe in (shard, *routers):
        pipe.send(None)
    for process in processes:
        process.join(10)
    print_table(f"Batch {BATCH} by one router, or {BATCH // 2} by each of two on its core", list(rows[0]),
                [list(row.values()) for row in rows])  # fmt: skip
    save("two_halves", {"rows": rows, "turns": turns, "seconds_a_turn": seconds, "cores": len(cores)})


if __name__ == "__main__":
    main()
