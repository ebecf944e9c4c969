"""Copies of experts between two shards of a host, against a bare memcpy, and what they cost the routers.

    python -m benchmarks.data_plane.weight_copies [--quick] [--only-rates] [--kernel torch_loop] [--limits 50e6 1e9]

Two shards in processes of their own: one holds all experts of a random model, the other one takes them: out of the
other process's memory, through a ring of shared memory, over loopback TCP, and from the checkpoint (page cache).
In the same rounds the taker copies as many bytes into the same slots with memcpy. Goal: at least 0.6 of memcpy's bytes
a second between shards. Beside the seconds that passed stand the processor seconds of both shards, which say more on a
busy machine. `fresh` is the first fill of an empty shard, into memory that was never touched, by a source that has yet
to sum up what it holds. Then a router dispatches to both shards, each serving half of the experts, while the taker
copies the other half over and over: at several limits, without one, and without giving way to requests.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import TINY_MODEL, median, percentile, print_table, save
from experts.protocol.membership import Membership, ShardEndpoint
from experts.protocol.orders import CopyOrder, CopyResult
from experts.protocol.settings import RouterSettings, ShardSettings
from experts.transports.weights import pace
from experts.transports.weights.memory import PeerMemory
from placement.placement import Placement

GOAL = 0.6
SIZES = {  # name: (hidden, width, experts, layers)
    "0.79 MB": (512, 256, 64, 8),
    "9.4 MB": (2048, 768, 16, 2),
    "44 MB": (7168, 1024, 8, 1),
}
TOP_K = 8
START_TIMEOUT_S = 300.0
CALL_TIMEOUT_S = 300.0
TURNS = 3  # how often each limit comes up, as the machine may be busy in one of them


def make_checkpoint(folder: Path, hidden: int, width: int, experts: int, layers: int) -> None:
    """The routed experts of a random Qwen3-MoE in bfloat16."""
    from safetensors.torch import save_file

    config = json.loads((TINY_MODEL / "config.json").read_text())
    config |= {
        "hidden_size": hidden, "moe_intermediate_size": width, "num_hidden_layers": layers, "num_experts": experts,
        "num_local_experts": experts, "num_experts_per_tok": min(TOP_K, experts // 2), "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight": (
            torch.randn(size, generator=generator) * 0.02
        ).to(torch.bfloat16)
        for layer in range(layers)
        for expert in range(experts)
        for name, size in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width)))
    }
    save_file(tensors, folder / "model.safetensors")


class TakingShard:
    """What the taker's process does on command."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self.over = threading.Event()
        self.mover: threading.Thread | None = None
        self.moved_bytes = 0

    def cpu(self) -> float:
        """Processor seconds of this process so far."""
        return time.process_time()

    def connect(self, order: CopyOrder, way: str) -> None:
        """Copy one expert over a new connection, which `take` then finds."""
        self.server._mover.close()
        self.take([order], way)

    def take(self, orders: list[CopyOrder], way: str) -> tuple[float, float]:
        """Seconds to copy, passed and of the processor. RuntimeError if not all came that way."""
        results: list[CopyResult] = []
        allowed = PeerMemory.proven
        if way == "shm":  # as where this process may not read others
            PeerMemory.proven = lambda self: False  # type: ignore[method-assign]
        try:
            start_s, cpu_s = time.perf_counter(), time.process_time()
            self.server.copy(orders, results.append)
            took_s = time.perf_counter() - start_s, time.process_time() - cpu_s
        finally:
            PeerMemory.proven = allowed  # type: ignore[method-assign]
        if (sources := {result.error or result.source for result in results}) != {way}:
            raise RuntimeError(f"copies ended as {sources}, expected {way}")
        return took_s

    def release(self, pairs: list[tuple[int, int]]) -> int:
        return int(self.server.release(pairs))

    def memcpy(self) -> tuple[float, float, int]:
        """Seconds (passed, of the processor) and bytes of plain copies into all slots, from memory of the same size."""
        kernel = self.server._loop.slots.kernel
        slots = [(layer, slot) for layer in range(kernel.shape.num_layers) for slot in range(kernel.shape.num_slots)]
        targets = [view.numpy() for place in slots for view in kernel.slot_views(*place)]
        sources = [np.ones_like(target) for target in targets]
        start_s, cpu_s = time.perf_counter(), time.process_time()
        for source, target in zip(sources, targets, strict=True):
            np.copyto(target, source)
        took_s, cpu_s = time.perf_counter() - start_s, time.process_time() - cpu_s
        return took_s, cpu_s, sum(len(target) for target in targets)

    def keep_moving(self, orders: list[CopyOrder], limit: float | None, share: float) -> None:
        """Copy and release over and over until `stop_moving`; `share`: see `pace.SHARE`."""
        pace.SHARE = share
        self.over.clear()
        self.moved_bytes = 0

        def move() -> None:
            while not self.over.is_set():
                self.server.copy(orders, self._count, max_bytes_per_s=limit, cancelled=self.over.is_set)
                self.server.release([(order.layer, order.expert) for order in orders])

        self.mover = threading.Thread(target=move)
        self.mover.start()

    def _count(self, result: CopyResult) -> None:
        self.moved_bytes += result.size_bytes

    def stop_moving(self) -> int:
        """Bytes moved since `keep_moving`."""
        self.over.set()
        if self.mover is not None:
            self.mover.join()
        return self.moved_bytes


def shard_process(settings: dict[str, Any], placement: dict[str, Any], rank: int, slots: int, pipe: Any) -> None:
    """Process body: a shard that does what arrives through the pipe."""
    from experts.shard.server import ShardServer

    server = ShardServer(ShardSettings.model_validate(settings))
    pipe.send(server.start(Placement.from_json(placement), rank, 1, num_slots=slots))
    shard = TakingShard(server)
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(shard, name)(*arguments))


class Shard:
    """A shard's process as the benchmark sees it."""

    def __init__(self, process: Any, pipe: Any) -> None:
        self.process, self._pipe = process, pipe
        self.endpoint: ShardEndpoint = self._answer(START_TIMEOUT_S)

    def _answer(self, timeout_s: float) -> Any:
        if not self._pipe.poll(timeout_s):
            raise RuntimeError(f"the shard said nothing for {timeout_s:.0f} s")
        return self._pipe.recv()

    def __call__(self, name: str, *arguments: Any) -> Any:
        self._pipe.send((name, arguments))
        return self._answer(CALL_TIMEOUT_S)


@contextmanager
def shards(model: Path, placement: Placement, kernel: str) -> Iterator[list[Shard]]:
    """A process for each rank, with a slot for every expert."""
    context = multiprocessing.get_context("spawn")
    settings = ShardSettings(model_path=str(model), dtype="bfloat16", kernel=kernel).model_dump()
    started, running = [], []
    for rank in range(placement.num_ranks):
        ours, theirs = context.Pipe()
        arguments = (settings, placement.to_json(), rank, placement.num_experts, theirs)
        process = context.Process(target=shard_process, args=arguments, daemon=True)
        process.start()
        theirs.close()
        started.append((process, ours))
    try:
        running = [Shard(process, pipe) for process, pipe in started]
        yield running
    finally:
        for process, _ in started:
            process.kill()
            process.join()


def two_ranks(size: tuple[int, int, int, int], taker: range) -> Placement:
    """The first rank holds every expert, the second those of `taker`."""
    _, _, experts, layers = size
    row = [*range(experts), *taker, *[-1] * (experts - len(taker))]
    return Placement(2, 1, experts, np.array([row] * layers, np.int32), partial=True)


def rates(model: Path, size: tuple[int, int, int, int], kernel: str, rounds: int) -> list[dict[str, Any]]:
    """GB/s of each way, medians of `rounds`, by the seconds that passed and by the processor's."""
    _, _, experts, layers = size
    pairs = [(layer, expert) for layer in range(layers) for expert in range(experts)]
    took: dict[str, list[tuple[float, float]]] = {}
    with shards(model, two_ranks(size, range(0)), kernel) as (source, taker):
        sources = {"process": (source.endpoint,), "shm": (source.endpoint,), "checkpoint": ()}
        sources["tcp"] = (dataclasses.replace(source.endpoint, host_id="elsewhere"),)

        def copy(way: str) -> tuple[float, float]:
            """Seconds for all experts, by all but the first, with which the shards connect."""
            first, *others = [CopyOrder(*pair, sources[way]) for pair in pairs]
            taker("connect", first, way)
            lent_s = source("cpu")
            took_s, cpu_s = taker("take", others, way)
            share = len(pairs) / len(others)
            return took_s * share, (cpu_s + source("cpu") - lent_s) * share

        took["process, fresh"] = [copy("process")]
        nbytes = 0
        for _ in range(rounds):
            took_s, cpu_s, nbytes = taker("memcpy")
            took.setdefault("memcpy", []).append((took_s, cpu_s))
            for way in sources:
                taker("release", pairs)
                took.setdefault(way, []).append(copy(way))
    passed = {way: median([took_s for took_s, _ in values]) for way, values in took.items()}
    cpu = {way: median([cpu_s for _, cpu_s in values]) for way, values in took.items()}
    return [
        {
            "way": way, "gb_s": nbytes / passed[way] / 1e9, "of_memcpy": passed["memcpy"] / passed[way],
            "gb_cpu_s": nbytes / cpu[way] / 1e9, "of_memcpy_cpu": cpu["memcpy"] / cpu[way], "seconds": took[way],
        }
        for way in took
    ]  # fmt: skip


def latencies(
    model: Path, size: tuple[int, int, int, int], kernel: str, limits: list[float], seconds: float
) -> list[dict[str, Any]]:
    """Percentiles of a router's dispatches, without and with copies."""
    from experts.checkpoint import ExpertCheckpoint
    from experts.dispatch.layer_shape import LayerShape
    from experts.dispatch.mesh_client import MeshClient

    hidden, _, experts, layers = size
    half = experts // 2
    spec = ExpertCheckpoint.open(model).spec
    shape = LayerShape(layers, experts, spec.top_k, hidden, torch.bfloat16)
    settings = RouterSettings(model_path=str(model), trace_tokens=0, transport="shm", dispatch_timeout_ms=60_000)
    generator = torch.Generator().manual_seed(1)
    with shards(model, two_ranks(size, range(half)), kernel) as (source, taker):
        router = MeshClient(settings, ExpertCheckpoint.open(model), shape, "cpu")
        row = [*range(half, experts), *range(half)]
        served = Placement(2, 1, experts, np.array([row] * layers, np.int32))
        answer = router.apply_membership(Membership(1, served, (source.endpoint, taker.endpoint)))
        if answer.lost:
            raise RuntimeError(f"the router reached not all shards: {answer.lost}")
        orders = [CopyOrder(la, ex, (source.endpoint,)) for la in range(layers) for ex in range(half, experts)]
        x_TD = torch.randn(16, hidden, generator=generator).to(torch.bfloat16)
        weights_TK = torch.full((16, spec.top_k), 1.0 / spec.top_k)

        def dispatch(layer: int) -> float:
            ids_TK = torch.rand(16, experts, generator=generator).argsort(1)[:, : spec.top_k].to(torch.int32)
            start_s = time.perf_counter()
            router.finish(router.begin(layer, x_TD, weights_TK, ids_TK))
            return time.perf_counter() - start_s

        for number in range(200):
            dispatch(number % layers)
        modes: dict[str, tuple[float | None, float] | None] = {"none": None}
        modes |= {f"{limit / 1e6:.0f} MB/s": (limit, pace.SHARE) for limit in limits}
        modes |= {"no limit": (None, pace.SHARE), "no limit, no way given": (None, 1.0)}
        took: dict[str, list[float]] = {mode: [] for mode in modes}
        moved = dict.fromkeys(modes, 0)
        for number in range(TURNS * len(modes)):
            mode, options = list(modes.items())[number % len(modes)]
            if options:
                taker("keep_moving", orders, *options)
            end_s = time.perf_counter() + seconds / TURNS
            while time.perf_counter() < end_s:
                took[mode].append(dispatch(len(took[mode]) % layers) * 1e3)
            if options:
                moved[mode] += taker("stop_moving")
        quiet_ms = percentile(took["none"], 0.99)
        rows = [
            {
                "copies": mode, "moved_mb_s": moved[mode] / seconds / 1e6, "p50_ms": percentile(found, 0.5),
                "p99_ms": percentile(found, 0.99), "p99_ratio": percentile(found, 0.99) / quiet_ms,
                "dispatches_s": len(found) / seconds,
            }
            for mode, found in took.items()
        ]  # fmt: skip
        if router.status().lost:
            raise RuntimeError(f"the router lost shards: {router.status().lost}")
        router.close()
    return rows


def main() -> None:
    """Print the tables and write bench-results/weight_copies.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small experts of one layer, one round")
    parser.add_argument("--only-rates", action="store_true", help="no router")
    parser.add_argument("--kernel", default="native", help="kernel of both shards, %(default)s")
    parser.add_argument("--limits", type=float, nargs="*", default=[50e6, 1e9], help="bytes a second, %(default)s")
    parser.add_argument("--seconds", type=float, default=15.0, help="of dispatches with each limit, %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {"0.79 MB": (512, 256, 64, 1)} if args.quick else SIZES
    result: dict[str, Any] = {"goal": GOAL, "kernel": args.kernel, "rates": {}, "latencies": []}
    for name, size in sizes.items():
        with tempfile.TemporaryDirectory(prefix="expertmesh-copies-") as made:
            make_checkpoint(Path(made), *size)
            found = rates(Path(made), size, args.kernel, 1 if args.quick else 5)
            result["rates"][name] = found
            print_table(
                f"experts of {name}, kernel {args.kernel}; goal between shards {GOAL} of memcpy",
                ["way", "GB/s", "of memcpy", "GB/CPU s", "of memcpy, CPU"],
                [[*row.values()][:-1] for row in found],
            )
            if not result["latencies"] and not args.only_rates:
                result["latencies"] = latencies(Path(made), size, args.kernel, args.limits, args.seconds)
                rows = result["latencies"]
                print_table(
                    f"a router's dispatches of 16 rows, top-8 of 64 experts of {name}, beside copies",
                    list(rows[0]),
                    [list(row.values()) for row in rows],
                )
    save("weight_copies", result)


if __name__ == "__main__":
    main()
