"""`python -m benchmarks.gpu [--quick] [--only NAME,...] [--device cpu]`: every GPU benchmark, one table each.

It prints facts about the machine, runs each benchmark in a process of its own with a time limit, and ends with what was
left out and why. The exit status is the number of benchmarks that did not finish; a missed goal is no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time

from benchmarks.common import ROOT, hardware, versions
from benchmarks.gpu.common import absent
from benchmarks.processes import tied

ENDS_S = time.monotonic() + float(os.environ.get("GPU_BUDGET_S", "1e9"))  # see tests/run_gpu.py
# name: (limit in seconds, packages it needs)
BENCHMARKS: dict[str, tuple[float, tuple[str, ...]]] = {
    "kernels": (900.0, ("numba", "safetensors")),
    "router": (300.0, ("numba", "safetensors")),
    "round_trip": (600.0, ("numba", "safetensors")),
    "copy": (300.0, ("numba", "safetensors")),
    "engine": (3600.0, ("numba", "safetensors", "pydantic")),
}


def facts() -> dict[str, object]:
    """The machine and its software, for the heading of the figures."""
    import torch

    found: dict[str, object] = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "hardware": hardware()}
    found["versions"] = versions() | {"triton": _version_of("triton"), "cuda": str(torch.version.cuda)}
    if torch.cuda.is_available():
        from experts.transports.nccl_sharing import how_ranks_share

        found["gpus"] = torch.cuda.device_count()
        found["nccl"] = how_ranks_share()
    return found


def _version_of(package: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def run(name: str, more: list[str], limit_s: float) -> tuple[str, list[str]]:
    """(how it ended, what it left out). Its output is passed on as it comes."""
    limit_s = min(limit_s, max(ENDS_S - time.monotonic(), 5.0))
    left_out: list[str] = []
    with tied(
        [sys.executable, "-u", "-m", f"benchmarks.gpu.{name}", *more],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        start_s = time.monotonic()
        timer = threading.Timer(limit_s, os.killpg, (process.pid, signal.SIGKILL))  # its shards too
        timer.daemon = True
        timer.start()
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("left out: ") and line.strip() not in left_out:
                left_out.append(line.strip())
        status = process.wait()
        timer.cancel()
        seconds = time.monotonic() - start_s
    if seconds >= limit_s:
        return f"ended after {limit_s:.0f} s, its limit", left_out
    return ("done" if status == 0 else f"failed with status {status}") + f" in {seconds:.0f} s", left_out


def main() -> int:
    """Run the benchmarks; returns how many did not finish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few sizes and turns: does it work, not how fast")
    parser.add_argument("--only", default=",".join(BENCHMARKS), help="names, separated by commas")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal with tiny sizes")
    args = parser.parse_args()
    names = args.only.split(",")
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"--only {','.join(unknown)}: expected some of {', '.join(BENCHMARKS)}")
    missing = absent("torch", "numpy")
    if missing is not None:
        parser.error(missing)
    print(json.dumps(facts(), indent=1), flush=True)
    more = ["--device", args.device, *(["--quick"] if args.quick else [])]
    ends: dict[str, str] = {}
    left_out: dict[str, list[str]] = {}
    for name in names:
        limit_s, needs = BENCHMARKS[name]
        print(f"\n=== benchmarks.gpu.{name}", flush=True)
        lacking = absent(*needs)
        if lacking is None:
            ends[name], left_out[name] = run(name, more, limit_s)
        else:
            ends[name] = f"not run: {lacking}"
            print(ends[name])
    print("\n=== summary")
    for name, end in ends.items():
        print(f"  {name}: {end}")
        for line in left_out.get(name, []):
            print(f"    {line}")
    return sum(not end.startswith("done") for end in ends.values())
