"""Shared by the GPU benchmarks: ceilings measured in the same run, timing on the device, what was left out and why.

Every benchmark also runs with `--device cpu`, a rehearsal with tiny sizes whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.common import median, print_table, save

L2_BYTES = 256 << 20  # more than any GPU's last-level cache


@dataclass
class Report:
    """One benchmark's tables, and what it left out."""

    name: str
    device: str
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def table(self, title: str, rows: Sequence[dict[str, Any]]) -> None:
        """Print rows, which share their keys, and keep them."""
        if not rows:
            self.leave_out(title, "it has no rows, see above")
            return
        self.tables[title] = list(rows)
        print_table(title, list(rows[0]), [list(row.values()) for row in rows])

    def leave_out(self, what: str, why: str) -> None:
        """Print now, and again at the end, that something was not measured."""
        line = f"left out: {what}: {why}"
        print(line, flush=True)
        self.left_out.append(line)

    def end(self, **facts: Any) -> None:
        """Repeat what was left out and, unless this is a rehearsal, write bench-results/NAME.json."""
        for line in self.left_out:
            print(line)
        if self.device == "cpu":
            print("a rehearsal on the CPU: these figures mean nothing")
            return
        save(self.name, {"device": self.device, "tables": self.tables, "left_out": self.left_out, **facts})


def arguments(text: str | None, more: Callable[[argparse.ArgumentParser], None] | None = None) -> argparse.Namespace:
    """The command line of a GPU benchmark. Exits with a message if there is no such device."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few sizes and turns: does it work, not how fast")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal with tiny sizes")
    if more is not None:
        more(parser)
    found = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if found.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {found.device}, but this torch ({torch.__version__}) sees no CUDA device")
    return found


def absent(*modules: str) -> str | None:
    """A sentence on which modules are not installed; None if all are."""
    gone = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"{', '.join(gone)} {'is' if len(gone) == 1 else 'are'} not installed" if gone else None


def synchronize(device: str) -> None:
    """Wait until the device is idle."""
    if device != "cpu":
        torch.cuda.synchronize()


def wall_us(call: Callable[[], object], device: str, runs: int) -> list[float]:
    """Microseconds of each call including the device's work, which the host waits for every time."""
    times = []
    for _ in range(runs):
        synchronize(device)
        start_s = time.perf_counter()
        call()
        synchronize(device)
        times.append((time.perf_counter() - start_s) * 1e6)
    return times


SLEEP_CYCLES = 60_000_000  # about 30 ms


def device_us(call: Callable[[], object], device: str, runs: int, repeats: int = 5) -> float:
    """Microseconds of a call when calls queue up on the device: the median of `repeats` trains of `runs` calls.

    Each train is queued behind a kernel that sleeps, so Python's launch time does not count.
    """
    if device == "cpu":
        return median(wall_us(call, device, runs))
    trains = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(SLEEP_CYCLES)
        begin.record()
        for _ in range(runs):
            call()
        end.record()
        torch.cuda.synchronize()
        trains.append(begin.elapsed_time(end) * 1000 / runs)
    return median(trains)


@dataclass(frozen=True)
class Ceilings:
    """The best this device reached in this run."""

    read_bytes_per_s: float
    copy_bytes_per_s: float
    matmul_flops: float

    def line(self) -> str:
        """One line of text."""
        return (
            f"ceilings measured in this run: {self.read_bytes_per_s / 1e9:,.0f} GB/s read, "
            f"{self.copy_bytes_per_s / 1e9:,.0f} GB/s copied (read and written), "
            f"{self.matmul_flops / 1e12:,.1f} TFLOP/s matmul"
        )


def measure_ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """Measure each ceiling as the best of several turns. Takes some seconds."""
    on_cpu = device == "cpu"
    size, nbytes = (128, 1 << 20) if on_cpu else (8192, 4 << 30)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    reads, copies, products = [], [], []
    for _ in range(3 if on_cpu else 8):
        reads.append(device_us(source.sum, device, 3, 1))
        copies.append(device_us(lambda: target.copy_(source), device, 3, 1))
        products.append(device_us(lambda: torch.mm(a, b, out=product), device, 3, 1))
    return Ceilings(
        read_bytes_per_s=source.nbytes / min(reads) * 1e6,
        copy_bytes_per_s=2 * source.nbytes / min(copies) * 1e6,
        matmul_flops=2.0 * size**3 / min(products) * 1e6,
    )
