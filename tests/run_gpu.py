"""`python tests/run_gpu.py [--only NAME,...]`: run every test marked `gpu`, and name what could not be run.

Needs torch for CUDA, pytest and numpy. A file is not run if a package that it imports (pydantic, triton, ...) is
missing; the package is named. Each file runs in its own process with a time limit, so that a hang costs one file. The
exit status counts the files that failed or were not run; without a CUDA device that is all of them. GPU_BUDGET_S in
the environment limits the whole run.
"""

from __future__ import annotations

import argparse
import ast
import functools
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
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE_LIMIT_S = 600.0
TEST_LIMIT_S = 120.0
WAIT_S = 60.0
# A command that is killed from outside leaves its children behind; this limit lets them end before that.
ENDS_S = time.monotonic() + float(os.environ.get("GPU_BUDGET_S", "1e9"))
SHOWN = ("torch", "triton", "vllm", "ray", "numpy", "numba", "pydantic", "scipy", "safetensors", "hypothesis", "pytest")


def gpu_files() -> list[str]:
    """The test files that name the mark `gpu`; tests/conftest.py refuses it where a file does not name it itself."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in paths if _names_mark(_parse(path), "gpu")]


def needs(file: str) -> set[str]:
    """Packages from elsewhere without which no test of the file can run, found without importing any of them.

    What the file and its conftests import at module level, directly or through modules of this repository; and triton
    where `pytestmark` gives the whole file that mark.
    """
    path = ROOT / file
    conftests = [folder / "conftest.py" for folder in path.parents if folder.is_relative_to(ROOT / "tests")]
    found = {"pytest"}
    seen: set[Path] = set()
    pending = [path, *(conftest for conftest in conftests if conftest.exists())]
    while pending:
        source = pending.pop()
        if source in seen:
            continue
        seen.add(source)
        for module in _module_imports(source):
            top = module.partition(".")[0]
            ours = _sources_of(module)
            pending += ours
            if not ours and top not in sys.stdlib_module_names and top != "__future__":
                found.add(top)
    marks = [node for node in _parse(path).body if isinstance(node, ast.Assign) and _targets(node) == ["pytestmark"]]
    return found | {"triton" for node in marks if _names_mark(node, "triton")}


@functools.cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _targets(node: ast.Assign) -> list[str]:
    return [ast.unparse(target) for target in node.targets]


def _names_mark(tree: ast.AST, mark: str) -> bool:
    attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return any(ast.unparse(node) == f"pytest.mark.{mark}" for node in attributes)


def _module_imports(path: Path) -> Iterator[str]:
    """Modules that importing a file imports: those under `if TYPE_CHECKING` or in functions are not among them."""
    for node in _parse(path).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _sources_of(module: str) -> list[Path]:
    """The files of this repository that importing a module, or a name of one, executes: packages first."""
    parts = module.split(".")
    places = [ROOT.joinpath(*parts[: count + 1]) for count in range(len(parts))]
    candidates = [file for place in places for file in (place / "__init__.py", place.with_suffix(".py"))]
    return [file for file in candidates if file.exists()]


def version_of(package: str) -> str:
    """Its version, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe() -> bool:
    """Print what this machine has; true if it has a CUDA device."""
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


def run(file: str, limit_s: float = FILE_LIMIT_S) -> tuple[bool, str]:
    """(whether it passed, how it ended) of a file's tests marked `gpu`; prints their output as it comes."""
    # Without the project's own options, which need plug-ins; with a limit for each test if its plug-in is installed.
    options = ["-m", "gpu", "-o", "addopts=", "-v", "-rs", "--strict-markers", "-p", "no:cacheprovider"]
    options += ["--durations=5", "--maxfail=5"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        # By a thread: a test that hangs in CUDA or NCCL never returns to Python, where signals are handled.
        options += [f"--timeout={TEST_LIMIT_S:.0f}", "--timeout-method=thread"]
    if "/kernels/" in file and importlib.util.find_spec("xdist") is not None:
        options += ["-n", "8"]  # compiling takes most of their time
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", file, *options],
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
    status = process.wait(WAIT_S)  # its output has ended
    timed_out = not timer.is_alive()
    timer.cancel()
    if timed_out:
        return False, f"was killed after {limit_s:.0f} s"
    return verdict(lines, status)


def verdict(lines: list[str], status: int) -> tuple[bool, str]:
    """From pytest's output and exit status. A file that ran no test has not passed."""
    counted = re.compile(r"\d+ (passed|failed|error|skipped|deselected)")
    counts = next((line.strip("= ") for line in reversed(lines) if counted.search(line)), "")
    if status == 0 and " passed" not in counts:
        reasons = {line.partition(": ")[2] for line in lines if line.startswith("SKIPPED [")}
        return False, f"ran no test: {'; '.join([counts, *sorted(reasons)])}"
    return status == 0, counts or f"pytest ended with status {status}"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="parts of file names, separated by commas")
    parser.add_argument("--list", action="store_true", help="print what would run here, and run nothing")
    args = parser.parse_args()
    files = gpu_files()
    wanted = [file for file in files if any(part in file for part in args.only.split(","))]
    if not wanted:
        parser.error(f"--only {args.only}: expected parts of {', '.join(files)}")
    has_cuda = describe()
    ends: dict[str, tuple[bool, str]] = {}
    for file in wanted:
        missing = sorted(name for name in needs(file) if importlib.util.find_spec(name) is None)
        if missing:
            ends[file] = False, f"not run: {', '.join(missing)} missing"
        elif not has_cuda:
            ends[file] = False, "not run: no CUDA device"
        elif args.list:
            ends[file] = True, "would run"
        else:
            print(f"\n=== {file}", flush=True)
            ends[file] = run(file)
    print("\n=== in short")
    for file, (passed, end) in ends.items():
        print(f"  {'ok  ' if passed else 'FAIL'} {file}: {end}")
    return sum(not passed for passed, _ in ends.values())


if __name__ == "__main__":
    sys.exit(main())
