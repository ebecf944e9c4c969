"""The forms of the Triton expert kernels (`experts/kernels/triton`), measured one by one: which is best for which call.

    python -m benchmarks.gpu.tiles [--quick] [--shape NAME] [--format NAME] [--seconds 300] [--device cpu]

For each shape of `benchmarks.gpu.kernels`, format and number of rows, and for tiles of about as many pairs as a slot
has: the time of either program with every form that may fit, beside that of the form in the kernel's table. Programs
are compiled first, by several processes (Triton keeps them on disk). `floor_us` is what bytes or work take at the
ceilings measured in the same run. What the time does not suffice for is left out. On the CPU it needs Triton's
interpreter.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from benchmarks.gpu.common import Ceilings, Report, arguments, device_us, measure_ceilings
from benchmarks.gpu.kernels import PAIRS_PER_ROW, REHEARSAL, ROWS, SHAPES, shape_of
from experts.kernels import KernelShape
from experts.kernels.pick import random_pairs, random_weights
from experts.kernels.quantized import QuantizedShape
from experts.kernels.triton import mlp, quantized
from experts.kernels.triton.forms import Form, shared_bytes
from experts.kernels.triton.tiles import (
    ThreePrograms,
    compile_program,
    most_pairs,
    run_program,
    tile_pairs,
    triton_misfit,
)

PROGRAMS = ("gate_up", "down")
BLOCKS = (16, 32, 64, 128)
BEST = 4  # forms shown of a call


@dataclass(frozen=True)
class Candidate:
    """One form of one program for tiles of `block` pairs."""

    program: str
    block: int
    form: Form

    def tables(self, module: ModuleType) -> dict[int, Form]:
        """The kernel's table that has the form of this program."""
        return module.GATE_UP if self.program == "gate_up" else module.DOWN  # type: ignore[no-any-return]


@dataclass
class Only:
    """Runs one program of a kernel, and none of the others."""

    program: str
    run: Any = run_program
    seen: list[str] = field(default_factory=list)

    def __call__(self, program: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        name = getattr(program, "__name__", None) or program.fn.__name__
        if name == self.program:
            self.seen.append(name)
            self.run(program, grid, *arguments, **options)


def module_of(shape: KernelShape) -> ModuleType:
    """The module with the kernel for `shape` and its tables."""
    return quantized if isinstance(shape, QuantizedShape) else mlp


def kernel_of(shape: KernelShape) -> ThreePrograms:
    """The kernel for `shape`, with no slot set."""
    if isinstance(shape, QuantizedShape):
        return quantized.TritonQuantizedKernel(shape)
    return mlp.TritonMlpKernel(shape)


def candidates(shape: KernelShape, quick: bool) -> Iterator[Candidate]:
    """Forms that registers and shared memory may have room for, and the ones in the tables."""
    module, rehearsal = module_of(shape), shape.device_type == "cpu"
    itemsize = shape.dtype.itemsize
    for program, block in itertools.product(PROGRAMS, (16,) if rehearsal else BLOCKS):
        if block > most_pairs(shape.dtype):
            continue
        given = Candidate(program, block, Form(0, 0, 0, 0)).tables(module)[block]
        matrices = 2 if program == "gate_up" else 1
        found = {given}
        sizes = itertools.product((32, 64, 128, 256), (32, 64, 128, 256), (4, 8), (2, 3, 4, 5))
        for columns, depth, warps, stages in [] if rehearsal else sizes:
            if isinstance(shape, QuantizedShape) and (
                128 % depth or (depth < shape.format.group and shape.format.group < 128)
            ):
                continue
            registers = matrices * block * columns / (32 * warps)  # of accumulators, a thread
            shared = stages * itemsize * depth * (block + matrices * columns)
            if not 8 <= registers <= 140 or shared > shared_bytes(shape.device):
                continue
            if quick and (warps != given.warps or stages != given.stages):
                continue
            found.add(Form(columns, depth, warps, stages))
        if rehearsal:
            found.add(Form(32, 32, 4, 2))
        yield from (Candidate(program, block, form) for form in sorted(found, key=str))


class Call:
    """One call of a kernel's program, over layers and pairs in turn."""

    def __init__(self, kernel: ThreePrograms, num_rows: int, block: int) -> None:
        self.kernel, self.block = kernel, block
        shape = kernel.shape
        generator = torch.Generator().manual_seed(num_rows)
        drawn = [random_pairs(num_rows, shape.num_slots, PAIRS_PER_ROW, generator) for _ in range(shape.num_layers)]
        self.rows_MD = torch.randn(num_rows, shape.hidden_size, generator=generator).to(shape.device, shape.dtype)
        self.pairs = [tile_pairs(*each, shape, block) for each in drawn]
        most = max(len(slots_N) for _, slots_N, _ in drawn)
        self.h_PI = torch.randn(most, shape.intermediate_size, device=shape.device).to(shape.dtype)
        self.y_ND = torch.empty(most, shape.hidden_size, dtype=torch.float32, device=shape.device)
        self.num_pairs = sum(len(slots_N) for _, slots_N, _ in drawn) / len(drawn)
        self.num_slots = sum(slots_N.unique().numel() for _, slots_N, _ in drawn) / len(drawn)
        self._turn = itertools.count()

    def run(self, candidate: Candidate, only: Only) -> None:
        """The next layer's."""
        layer = next(self._turn) % len(self.pairs)
        table = candidate.tables(module_of(self.kernel.shape))
        before, table[self.block] = table[self.block], candidate.form
        try:
            self.kernel._matmuls(only, layer, self.rows_MD, self.pairs[layer], self.h_PI, self.y_ND)
        finally:
            table[self.block] = before

    def floor_us(self, program: str, ceilings: Ceilings) -> float:
        """What the program's bytes of weights, or its work, take at the ceilings."""
        shape, share = self.kernel.shape, 2 / 3 if program == "gate_up" else 1 / 3
        flops = self.num_pairs * 6 * shape.hidden_size * shape.intermediate_size * share
        by_bytes = self.num_slots * shape.expert_bytes * share / ceilings.read_bytes_per_s
        return max(by_bytes, flops / ceilings.matmul_flops) * 1e6


def compile_some(job: tuple[KernelShape, list[Candidate]]) -> list[tuple[Candidate, str]]:
    """Have Triton compile candidates; returns those it refuses, with the reason."""
    shape, wanted = job
    kernel, refused = kernel_of(shape), []
    calls = {block: Call(kernel, 4, block) for block in {candidate.block for candidate in wanted}}
    for candidate in wanted:
        try:
            calls[candidate.block].run(candidate, Only(candidate.program, compile_program))
        except Exception as error:
            refused.append((candidate, f"{type(error).__name__}: {error}"[:100]))
    return refused


def compile_all(shape: KernelShape, wanted: Sequence[Candidate], processes: int) -> set[Candidate]:
    """Those of `wanted` that compile. In processes of their own, since Triton's compiler takes one core."""
    from dataclasses import replace

    small = replace(shape, num_layers=1, num_slots=2)
    parts = [(small, list(wanted[number :: 4 * processes])) for number in range(4 * processes)]
    refused: set[Candidate] = set()
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for some in pool.imap_unordered(compile_some, parts):
            for candidate, why in some:
                print(f"left out: {candidate}: {why}", flush=True)
                refused.add(candidate)
    return set(wanted) - refused


def near(block: int, pairs_of_slot: float, most: int) -> bool:
    """Whether tiles of `block` pairs may be right where a slot has so many."""
    return pairs_of_slot / 4.2 <= block <= max(16.0, 4 * pairs_of_slot) or (block == most and pairs_of_slot > 4 * most)


def sweep(
    shape: KernelShape, label: str, rows: Sequence[int], ceilings: Ceilings, report: Report, quick: bool, ends_s: float
) -> list[dict[str, Any]]:
    """The best forms of each program and number of rows, and the table's."""
    kernel, module = kernel_of(shape), module_of(shape)
    weights = random_weights(shape, torch.Generator().manual_seed(0))
    for layer, slot in itertools.product(range(shape.num_layers), range(shape.num_slots)):
        kernel.set_slot(layer, slot, weights)
    good = set(candidates(shape, quick))
    if shape.device_type != "cpu":
        good = compile_all(shape, sorted(good, key=str), max((os.cpu_count() or 2) - 1, 1))
    found = []
    for num_rows, program in itertools.product(rows, PROGRAMS):
        if time.monotonic() > ends_s:
            report.leave_out(f"{label}, {num_rows} rows, {program}", "no time was left")
            continue
        most = most_pairs(shape.dtype)
        times: list[tuple[float, Candidate]] = []
        calls = {block: Call(kernel, num_rows, block) for block in BLOCKS if block <= most}
        for candidate in sorted(good, key=str):
            call = calls[candidate.block]
            if candidate.program != program or not near(candidate.block, call.num_pairs / shape.num_slots, most):
                continue
            only = Only(program)
            try:
                call.run(candidate, only)
                turns = 2 if num_rows > 1024 else max(2, shape.num_layers)
                took_us = device_us(lambda c=candidate, o=only, at=call: at.run(c, o), shape.device, turns, 2)
                times.append((took_us, candidate))
            except Exception as error:
                report.leave_out(f"{label}, {num_rows} rows, {candidate}", repr(error)[:100])
        times.sort(key=lambda each: each[0])
        for rank, (took_us, candidate) in enumerate(times):
            ours = candidate.tables(module)[candidate.block] == candidate.form
            if rank < BEST or ours:
                floor_us = calls[candidate.block].floor_us(program, ceilings)
                found.append(
                    {
                        "weights": label, "rows": num_rows, "program": program, "rank": rank + 1, "of": len(times),
                        "block": candidate.block, **vars(candidate.form), "device_us": took_us,
                        "floor_us": floor_us, "share": floor_us / took_us, "in_table": ours,
                    }
                )  # fmt: skip
    return found


def main() -> None:
    """Print one table for each shape."""

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--shape", choices=list(SHAPES), help="one shape only")
        parser.add_argument("--format", help="bfloat16, fp8_block, mxfp4 or int4 alone")
        parser.add_argument("--seconds", type=float, default=300.0, help="when to stop")

    args = arguments(__doc__, more)
    report, ends_s = Report("gpu_tiles", args.device), time.monotonic() + args.seconds
    on_cpu = args.device == "cpu"
    shapes = REHEARSAL if on_cpu else SHAPES if args.shape is None else {args.shape: SHAPES[args.shape]}
    ceilings = measure_ceilings(args.device, torch.float32 if on_cpu else torch.bfloat16)
    print(ceilings.line())
    rows = (3,) if on_cpu else (1, 64, 1024) if args.quick else ROWS
    for name, (hidden, width, slots, formats) in shapes.items():
        found = []
        for form in (None, *formats):
            label = form or "bfloat16"
            if args.format not in (None, label):
                continue
            shape = shape_of(name, args.device, form)
            reason = triton_misfit(shape)
            if reason is not None:
                report.leave_out(f"{name} {label}", reason)
                continue
            found += sweep(shape, label, rows, ceilings, report, args.quick, ends_s)
        report.table(f"{name}: hidden {hidden}, width {width}, {slots} experts on the shard", found)
    report.end(ceilings=vars(ceilings))


if __name__ == "__main__":
    main()
