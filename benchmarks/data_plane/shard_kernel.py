"""Expert kernels against the machine's bound: rows per second of one MoE layer on one shard, by kernel and row count.

    python -m benchmarks.data_plane.shard_kernel [--quick] [--device cuda] [--shape NAME|all] [--threads 1]

The bound of a call is the larger of two times: its floating-point work at the measured matmul peak, and its bytes
(weights of the slots it touches, rows in and out) at the measured read bandwidth. Layers take turns, enough of them to
exceed the caches. Pairs are ragged, four per row on average, as one of two shards gets them from a top-8 router;
"uniform" rows have exactly four, the form in which vLLM's CPU kernel runs inside vLLM. Kernels and probes take turns;
medians count. With one CPU thread, the time is that thread's CPU time, which other load on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import median, print_table, save
from experts.kernels import KERNELS, ExpertKernel, KernelShape
from experts.kernels.native.kernel import FORMAT_IDS
from experts.kernels.native.library import load_library
from experts.kernels.pick import random_pairs, random_weights
from experts.model.spec import ActivationSpec

# hidden, width, slots, layers
SHAPES = {
    "bench": (512, 256, 32, 8),
    "qwen3-30b": (2048, 768, 32, 2),
    "deepseek-v3-8": (7168, 2048, 8, 1),
    "deepseek-v3-32": (7168, 2048, 32, 1),
}
ROWS = {"cpu": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512), "cuda": (1, 4, 16, 64, 256, 1024, 4096)}
PAIRS_PER_ROW = 4
PROBE_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}
Pairs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def time_s(call: Callable[[], None], device: str) -> float:
    """Seconds of one call, the device's work included."""
    clock = time.thread_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


class Probes:
    """The machine's two ceilings: the best of all probes."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        size = 1024 if device == "cpu" else 8192
        self._device = device
        self._flops = 2.0 * size**3
        self._a, self._b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        self._memory = torch.ones(PROBE_BYTES[device] // 4, device=device)
        self.peak_flops = 0.0
        self.read_bytes_per_s = 0.0
        # torch's matmul is far from the peak on some processors; our own inner loop, in cache, is a second probe.
        native = KERNELS["native"].supports(KernelShape(1, 1, 1, 1, ActivationSpec("silu"), dtype=dtype, device=device))
        self._library = load_library() if native is None else None
        self._format = FORMAT_IDS[dtype]

    def run(self) -> None:
        """Probe once more."""
        self.peak_flops = max(self.peak_flops, self._flops / time_s(self._matmul, self._device))
        self.read_bytes_per_s = max(self.read_bytes_per_s, self._memory.nbytes / time_s(self._read, self._device))
        if self._library is not None:
            library, repeats = self._library, 2000
            flops = 0.0

            def probe() -> None:
                nonlocal flops
                flops = library.expert_mlp_probe(self._format, repeats)

            seconds = time_s(probe, self._device)
            self.peak_flops = max(self.peak_flops, flops / seconds)

    def _matmul(self) -> None:
        torch.mm(self._a, self._b)

    def _read(self) -> None:
        self._memory.sum()


def uniform_pairs(num_rows: int, num_slots: int) -> Pairs:
    """Exactly PAIRS_PER_ROW distinct slots for each row."""
    order = torch.rand(num_rows, num_slots).argsort(dim=1)[:, :PAIRS_PER_ROW]
    offsets = torch.arange(num_rows + 1, dtype=torch.int32) * order.shape[1]
    return offsets, order.flatten().int().contiguous(), torch.rand(order.numel())


def build_kernels(shape: KernelShape) -> tuple[dict[str, ExpertKernel], dict[str, str]]:
    """(all kernels that support the shape, filled with random experts; why the others do not, by name)."""
    kernels: dict[str, ExpertKernel] = {}
    refused: dict[str, str] = {}
    weights = random_weights(shape)
    for name, kernel_class in KERNELS.items():
        reason = kernel_class.supports(shape)
        if reason is not None:
            refused[name] = reason
            continue
        kernel = kernel_class(shape)
        for layer in range(shape.num_layers):
            for slot in range(shape.num_slots):
                kernel.set_slot(layer, slot, weights)
        kernels[name] = kernel
    return kernels, refused


def measure(
    shape: KernelShape, kernels: dict[str, ExpertKernel], probes: Probes, num_rows: int, pattern: str, turns: int
) -> dict[str, Any]:
    """Median time of each kernel for one call of `num_rows`, and the call's work and bytes."""
    make = uniform_pairs if pattern == "uniform" else (lambda m, s: random_pairs(m, s, PAIRS_PER_ROW))
    calls = [make(num_rows, shape.num_slots) for _ in range(shape.num_layers)]
    rows_MD = torch.randn(num_rows, shape.hidden_size).to(shape.device, shape.dtype)
    out_MD = torch.empty_like(rows_MD)
    samples: dict[str, list[float]] = {name: [] for name in kernels}
    for turn in range(turns + 1):
        probes.run()
        for name, kernel in kernels.items():

            def layers(kernel: ExpertKernel = kernel) -> None:
                for layer, pairs in enumerate(calls):
                    kernel.forward(layer, rows_MD, *pairs, out_MD)

            seconds = time_s(layers, shape.device) / shape.num_layers
            if turn:  # the first turn warms up
                samples[name].append(seconds)
    pairs_per_call = sum(slots.numel() for _, slots, _ in calls) / len(calls)
    slots_per_call = sum(slots.unique().numel() for _, slots, _ in calls) / len(calls)
    return {
        "rows": num_rows,
        "pattern": pattern,
        "pairs": pairs_per_call,
        "flops": pairs_per_call * 6 * shape.hidden_size * shape.intermediate_size,
        "bytes": slots_per_call * shape.expert_bytes + 2 * rows_MD.nbytes,
        "call_us": {name: median(times) * 1e6 for name, times in samples.items()},
    }


def compare(name: str, dtype: torch.dtype, device: str, quick: bool, turns: int) -> dict[str, Any]:
    """Print the table of all kernels on one shape and dtype; returns it as a record."""
    hidden, width, slots, layers = SHAPES[name]
    shape = KernelShape(layers, slots, hidden, width, ActivationSpec("silu"), dtype=dtype, device=device)
    kernels, refused = build_kernels(shape)
    shown = [kernel for kernel in KERNELS if kernel in kernels]
    probes = Probes(dtype, device)
    row_counts = (1, 64) if quick else ROWS[device]
    cases = [(rows, "ragged") for rows in row_counts] + [
        (rows, "uniform") for rows in row_counts if rows in (16, 64, 256)
    ]
    records = [measure(shape, kernels, probes, rows, pattern, turns) for rows, pattern in cases]
    table = []
    for record in records:
        by_work, by_bytes = record["flops"] / probes.peak_flops, record["bytes"] / probes.read_bytes_per_s
        record["bound_rows_per_s"] = record["rows"] / max(by_work, by_bytes)
        record["bound_by"] = "matmul" if by_work > by_bytes else "memory"
        record["rows_per_s"] = {k: record["rows"] / us * 1e6 for k, us in record["call_us"].items()}
        record["share_of_bound"] = {k: v / record["bound_rows_per_s"] for k, v in record["rows_per_s"].items()}
        cells = [f"{record['rows_per_s'][k]:,.0f} ({record['share_of_bound'][k]:.2f})" for k in shown]
        best = min(record["call_us"], key=lambda k: record["call_us"][k])
        vllm_us = record["call_us"].get("vllm_triton" if device == "cuda" else "vllm_cpu")
        record["best_over_vllm"] = None if vllm_us is None else vllm_us / record["call_us"][best]
        ratio = "-" if record["best_over_vllm"] is None else f"{best} {record['best_over_vllm']:.2f}x"
        bound = f"{record['bound_rows_per_s']:,.0f} {record['bound_by']}"
        table.append([record["rows"], record["pattern"], bound, *cells, ratio])
    title = (
        f"{name}: hidden {hidden}, width {width}, {slots} slots, {dtype}, {device}, {torch.get_num_threads()} threads;"
        f" rows/s (share of the bound: {probes.peak_flops / 1e9:,.0f} GFLOP/s,"
        f" {probes.read_bytes_per_s / 1e9:.1f} GB/s)"
    )
    print_table(title, ["rows", "pairs", "bound", *shown, "best over vLLM's"], table)
    for kernel, reason in refused.items():
        print(f"  {kernel}: {reason}")
    return {
        "shape": name,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "peak_gflops": probes.peak_flops / 1e9,
        "read_gb_per_s": probes.read_bytes_per_s / 1e9,
        "refused": refused,
        "cases": records,
    }


def main() -> None:
    """Print the tables and write bench-results/shard_kernel.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two row counts, two turns: does it work, not how fast")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=(*SHAPES, "all"), help="default: bench on the CPU, all others on CUDA")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; a shard has one")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    on_cuda = arguments.device == "cuda"
    default = [name for name in SHAPES if (name != "bench") == on_cuda]
    names = {None: default, "all": list(SHAPES)}.get(arguments.shape, [arguments.shape])
    dtypes = (torch.bfloat16,) if on_cuda else (torch.bfloat16, torch.float16, torch.float32)
    turns = 2 if arguments.quick else 7
    runs = [compare(name, dtype, arguments.device, arguments.quick, turns) for name in names for dtype in dtypes]
    save("shard_kernel", {"threads": arguments.threads, "turns": turns, "runs": runs})


if __name__ == "__main__":
    main()
