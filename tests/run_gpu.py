"""`python tests/run_gpu.py [--only NAME,...]`: everything that a GPU machine can test, and what it could not.

Needs torch for CUDA, pytest and numpy; what else is missing (triton, pydantic, vllm, ...) costs the tests that need it,
by name. Each file runs in a process of its own with a limit of time, so that a hang costs one file. The exit status
counts the files that failed or were not run; it is not 0 either where torch sees no CUDA device. GPU_BUDGET_S in the
environment bounds the whole.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALWAYS = ("torch", "numpy", "pytest", "numba", "safetensors")
MESH = (*ALWAYS, "pydantic", "scipy")
# file: (limit in seconds, packages, arguments of pytest). Over gloo the tests of pairs run on every machine: not here.
FILES: dict[str, tuple[float, tuple[str, ...], tuple[str, ...]]] = {
    "tests/experts/kernels/test_compiles.py": (600.0, (*ALWAYS, "triton"), ()),
    "tests/experts/dispatch/rows/test_triton_programs.py": (300.0, (*ALWAYS, "triton"), ()),
    "tests/experts/dispatch/captured/test_fixed_dispatch.py": (300.0, (*ALWAYS, "triton"), ()),
    "tests/experts/dispatch/rows/test_dispatcher_on_device.py": (300.0, (*MESH, "triton"), ()),
    "tests/experts/kernels/test_kernels_gpu.py": (600.0, (*ALWAYS, "hypothesis"), ("-m", "gpu")),
    "tests/experts/kernels/test_quantized.py": (600.0, (*ALWAYS, "hypothesis"), ("-m", "gpu")),
    "tests/experts/dispatch/captured/test_exchange.py": (300.0, (*MESH, "triton"), ("-k", "not gloo_split")),
    "tests/experts/transports/test_nccl.py": (600.0, MESH, ("-k", "not gloo_split")),
}
TEST_LIMIT_S = 120.0
# A command that is ended from outside leaves its children behind: with this they are over by then.
ENDS_S = time.monotonic() + float(os.environ.get("GPU_BUDGET_S", "1e9"))
SHOWN = ("torch", "triton", "vllm", "ray", "numpy", "numba", "pydantic", "scipy", "safetensors", "hypothesis", "pytest")


def version_of(package: str) -> str:
    """Or that it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe() -> bool:
    """Print what this machine has; whether that is a CUDA device."""
    print(f"python {platform.python_version()}; " + "; ".join(f"{name} {version_of(name)}" for name in SHOWN))
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no CUDA device")
        return False
    sys.path.insert(0, str(ROOT))
    from experts.transports.nccl_sharing import how_ranks_share

    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    print(f"CUDA {torch.version.cuda}: {names}; {how_ranks_share()}")
    return True


def run(file: str, limit_s: float, more: tuple[str, ...], workers: tuple[str, ...] = ()) -> tuple[bool, str]:
    """(whether it passed, how it ended); its output goes to standard output as it comes."""
    # Without the project's own options, which need plug-ins; with a limit for each test where the plug-in is there.
    options = ["-o", "addopts=", "-v", "-rs", "--strict-markers", "-p", "no:cacheprovider", "--durations=5"]
    options += ["--maxfail=5"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        # By a thread: a test that hangs in CUDA or NCCL never comes back to Python to see a signal.
        options += [f"--timeout={TEST_LIMIT_S:.0f}", "--timeout-method=thread"]
    if importlib.util.find_spec("xdist") is not None:
        more = (*more, *workers)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", file, *options, *more],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    limit_s = min(limit_s, max(ENDS_S - time.monotonic(), 5.0))
    timer = threading.Timer(limit_s, lambda: os.killpg(process.pid, signal.SIGKILL))
    timer.daemon = True
    timer.start()
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.strip())
    status = process.wait()
    timed_out = not timer.is_alive()
    timer.cancel()
    if timed_out:
        return False, f"was ended after {limit_s:.0f} s"
    counts = next(
        (line for line in reversed(lines) if re.search(r"\d+ (passed|failed|error|skipped|deselected)", line)), ""
    )
    if " passed" not in counts and status == 0:
        return False, f"ran no test: {counts.strip('= ')}"
    return status == 0, counts.strip("= ") or f"pytest ended with status {status}"


def main() -> int:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="parts of file names, separated by commas")
    parser.add_argument("--list", action="store_true", help="say what would run here, run nothing")
    args = parser.parse_args()
    wanted = [file for file in FILES if any(part in file for part in args.only.split(","))]
    if not wanted:
        parser.error(f"--only {args.only}: expected parts of {', '.join(FILES)}")
    has_cuda = describe()
    ends: dict[str, tuple[bool, str]] = {}
    for file in wanted:
        limit_s, needs, more = FILES[file]
        missing = [name for name in needs if importlib.util.find_spec(name) is None]
        if missing:
            ends[file] = False, f"not run: {', '.join(missing)} missing"
        elif not has_cuda:
            ends[file] = False, "not run: no CUDA device"
        elif args.list:
            ends[file] = True, "would run"
        else:
            print(f"\n=== {file}", flush=True)
            ends[file] = run(file, limit_s, more, ("-n", "8") if "kernels" in file else ())
    print("\n=== in short")
    for file, (passed, end) in ends.items():
        print(f"  {'ok  ' if passed else 'FAIL'} {file}: {end}")
    return sum(not passed for passed, _ in ends.values())


if __name__ == "__main__":
    sys.exit(main())
