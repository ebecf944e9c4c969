"""Expert kernels on a GPU against its ceilings and, where it runs, vLLM's fused MoE.

    python -m benchmarks.gpu.kernels [--quick] [--shape NAME] [--device cpu]

A call's bytes are the experts it touches plus its rows in and out; its work is 6 D I operations per pair. Pairs are
ragged, four per row on average, as one of two shards gets them from a top-8 router. `call_us` is a call the host waits
for, as a shard's loop does; `device_us` is one of several queued calls, and the shares are computed from it. Layers
take turns, so that no cache holds the weights. Goals: 0.8 of the read bandwidth where bytes are the bound, 0.7 of the
matmul peak where work is, and at least vLLM's speed.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch

from benchmarks.common import median
from benchmarks.gpu.common import L2_BYTES, Ceilings, Report, arguments, device_us, measure_ceilings, wall_us
from experts.checkpoint.weight_format import WeightFormat
from experts.kernels import ExpertKernel, KernelShape
from experts.kernels.pick import kernels_for, random_pairs, random_weights
from experts.kernels.quantized import QuantizedShape
from experts.model.spec import ActivationSpec

PAIRS_PER_ROW = 4
MEMORY_GOAL, MATMUL_GOAL = 0.8, 0.7
# hidden, width, slots, formats beside plain bfloat16
SHAPES: dict[str, tuple[int, int, int, tuple[str, ...]]] = {
    "deepseek-v3-8": (7168, 2048, 8, ("fp8_block", "int4")),
    "deepseek-v3-32": (7168, 2048, 32, ()),
    "qwen3-30b": (2048, 768, 32, ()),
    "gpt-oss-120b": (2880, 2880, 16, ("mxfp4",)),
}
REHEARSAL = {"tiny": (64, 32, 4, ("fp8_block", "mxfp4", "int4"))}
GROUPS = {"fp8_block": 128, "mxfp4": 32, "int4": 32}
ROWS = (1, 4, 16, 64, 256, 1024, 4096)
SLOW = ("torch_loop", "torch_dequant")  # the definition, not a contender


def shape_of(name: str, device: str, format_name: str | None) -> KernelShape:
    """The shape to build kernels for, with more layers than a cache can hold."""
    hidden, width, slots, _ = (REHEARSAL if device == "cpu" else SHAPES)[name]
    gpt_oss = name.startswith("gpt-oss")
    values: dict[str, Any] = {
        "num_slots": slots,
        "hidden_size": hidden,
        "intermediate_size": width,
        "activation": ActivationSpec("swigluoai", limit=7.0) if gpt_oss else ActivationSpec("silu"),
        "has_bias": gpt_oss,
        "dtype": torch.float32 if device == "cpu" else torch.bfloat16,
        "device": device,
    }
    form = None if format_name is None else WeightFormat(format_name, GROUPS[format_name])  # type: ignore[arg-type]

    def made(layers: int) -> KernelShape:
        if form is None:
            return KernelShape(layers, **values)
        return QuantizedShape(layers, **values, format=form)

    # One row touches few slots; their bytes in all layers together must exceed the cache.
    few = PAIRS_PER_ROW * made(1).expert_bytes
    return made(2 if device == "cpu" else min(8, max(2, -(-L2_BYTES // few))))


def build(shape: KernelShape, report: Report, label: str) -> dict[str, ExpertKernel]:
    """Every kernel that supports the shape, filled; the report names the others with their reasons."""
    kernels = {}
    weights = random_weights(shape, torch.Generator().manual_seed(0))
    form = shape.format.name if isinstance(shape, QuantizedShape) else None
    for name, candidate in kernels_for(shape).items():
        if getattr(candidate, "format_name", form) != form:
            continue
        reason = candidate.supports(shape)
        if reason is None and name in SLOW and shape.device != "cpu":
            reason = "it is the definition, not a contender"
        if reason is None:
            try:
                kernel = candidate(shape)
                for layer, slot in itertools.product(range(shape.num_layers), range(shape.num_slots)):
                    kernel.set_slot(layer, slot, weights)
                kernels[name] = kernel
            except Exception as error:  # one failing kernel must not cost the others' figures
                reason = f"failed to start: {type(error).__name__}: {error}"
        if reason is not None:
            report.leave_out(f"{label}, kernel {name}", reason)
    return kernels


def measure(kernel: ExpertKernel, num_rows: int, runs: int) -> dict[str, float]:
    """Times of one call, and its pairs and slots."""
    shape = kernel.shape
    generator = torch.Generator().manual_seed(num_rows)
    calls = [random_pairs(num_rows, shape.num_slots, PAIRS_PER_ROW, generator) for _ in range(max(4, shape.num_layers))]
    rows_MD = torch.randn(num_rows, shape.hidden_size, generator=generator).to(shape.device, shape.dtype)
    out_MD = torch.empty_like(rows_MD)
    turn = itertools.count()

    def call() -> None:
        at = next(turn)
        kernel.forward(at % shape.num_layers, rows_MD, *calls[at % len(calls)], out_MD)

    for _ in range(len(calls) + 2):
        call()
    times = wall_us(call, shape.device, runs)
    return {
        "pairs": sum(slots.numel() for _, slots, _ in calls) / len(calls),
        "slots": sum(slots.unique().numel() for _, slots, _ in calls) / len(calls),
        "call_us": median(times),
        "device_us": device_us(call, shape.device, runs),
    }


def row_of(
    label: str, kernel: ExpertKernel, num_rows: int, found: dict[str, float], ceilings: Ceilings
) -> dict[str, Any]:
    """One row of the table. `share` is the share of the ceiling that bounds the call, `goal` what it should reach."""
    shape = kernel.shape
    row_bytes = 2 * num_rows * shape.hidden_size * shape.dtype.itemsize
    nbytes = found["slots"] * shape.expert_bytes + row_bytes
    flops = found["pairs"] * 6 * shape.hidden_size * shape.intermediate_size
    by_bytes_us = nbytes / ceilings.read_bytes_per_s * 1e6
    by_work_us = flops / ceilings.matmul_flops * 1e6
    memory = by_bytes_us >= by_work_us
    return {
        "weights": label,
        "rows": num_rows,
        "kernel": kernel.name,
        "call_us": found["call_us"],
        "device_us": found["device_us"],
        "GB/s": nbytes / found["device_us"] / 1e3,
        "TFLOP/s": flops / found["device_us"] / 1e6,
        "bound": "memory" if memory else "matmul",
        "share": max(by_bytes_us, by_work_us) / found["device_us"],
        "goal": MEMORY_GOAL if memory else MATMUL_GOAL,
    }


def beside_vllm(rows: list[dict[str, Any]]) -> None:
    """Add the speed-up of each kernel over vLLM's on the same call; "-" where vLLM's did not run."""
    theirs = {(row["weights"], row["rows"]): row["device_us"] for row in rows if row["kernel"].startswith("vllm_")}
    for row in rows:
        vllm_us = theirs.get((row["weights"], row["rows"]))
        row["vllm's time over"] = "-" if vllm_us is None else vllm_us / row["device_us"]


def main() -> None:
    """Print one table per shape."""

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--shape", choices=list(SHAPES), help="one shape only")

    args = arguments(__doc__, more)
    report = Report("gpu_kernels", args.device)
    on_cpu = args.device == "cpu"
    ceilings = measure_ceilings(args.device, torch.float32 if on_cpu else torch.bfloat16)
    print(ceilings.line())
    row_counts = (0, 1, 3) if on_cpu else (1, 64, 1024) if args.quick else ROWS
    runs = 2 if on_cpu else 10 if args.quick else 30
    shapes = REHEARSAL if on_cpu else SHAPES if args.shape is None else {args.shape: SHAPES[args.shape]}
    for name, (hidden, width, slots, formats) in shapes.items():
        rows = []
        for form in (None, *formats):
            label = form or ("float32" if on_cpu else "bfloat16")
            for kernel in build(shape_of(name, args.device, form), report, f"{name} {label}").values():
                for num_rows in row_counts:
                    try:
                        found = measure(kernel, num_rows, runs)
                    except Exception as error:  # likewise
                        report.leave_out(f"{name} {label}, kernel {kernel.name}, {num_rows} rows", repr(error))
                        break
                    rows.append(row_of(label, kernel, num_rows, found, ceilings))
            if not on_cpu:
                torch.cuda.empty_cache()
        beside_vllm(rows)
        rows.sort(key=lambda row: (row["weights"], row["rows"], row["device_us"]))
        report.table(f"{name}: hidden {hidden}, width {width}, {slots} experts on the shard", rows)
    report.end(ceilings=vars(ceilings))


if __name__ == "__main__":
    main()
