"""Runs tests of a copied tree again and again, each time in a fork of a process that has the libraries loaded already.

One JSON object a line on stdin, {"tests": [...], "limit_s": ...}; one a line on stdout, {"outcome", "seconds", "tail"}.
Nothing of the project is imported before the fork, so every run sees the sources as they are at that time.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

LIBRARIES = (
    "numpy", "torch", "numba", "scipy", "hypothesis", "_hypothesis_pytestplugin", "hypothesis.stateful",
    "hypothesis.strategies", "hypothesis.extra.numpy", "pytest", "pytest_timeout", "yaml", "pydantic", "starlette",
    "fastapi", "httpx", "fastapi.testclient", "prometheus_client", "prometheus_client.parser", "safetensors.torch",
    "ray", "ray.exceptions", "ray.serve", "ray.serve.exceptions",
)  # fmt: skip


def main() -> None:
    """Serve until stdin closes."""
    sys.dont_write_bytecode = True  # a mutant has the size and time stamp of the source it replaced
    sys.path.insert(0, os.getcwd())
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # looking for plugins reads the file lists of all packages
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # else every collection in a child copies all pages
    _quick_hypothesis()
    if os.environ.get("NUMBA_DISABLE_JIT") == "1":
        _interpret_intrinsics()
    for line in sys.stdin:
        task = json.loads(line)
        print(json.dumps(_run(task["tests"], task["limit_s"])), file=answers, flush=True)


def _run(tests: list[str], limit_s: float) -> dict[str, object]:
    with tempfile.TemporaryFile() as log:
        start_s = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _child(tests, log.fileno())
        status = _await(pid, start_s + limit_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # and what the tests started
        seconds = time.monotonic() - start_s
        log.seek(0)
        tail = log.read().decode(errors="replace")[-3000:]
    if status is None:
        os.waitpid(pid, 0)
        outcome = "hung"
    elif os.waitstatus_to_exitcode(status) == 0:
        outcome = "survived"
    else:
        outcome = "no tests" if os.waitstatus_to_exitcode(status) == 5 else "killed"
    return {"outcome": outcome, "seconds": round(seconds, 2), "tail": tail}


def _await(pid: int, deadline_s: float) -> int | None:
    """The exit status of a child, None if it still ran at the deadline."""
    while time.monotonic() < deadline_s:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.02)
    return None


def _child(tests: list[str], log: int) -> None:
    os.setsid()
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 3
    try:
        import pytest

        code = int(
            pytest.main(
                [
                    "-x",
                    "-q",
                    "--assert=plain",
                    "-p",
                    "no:cacheprovider",
                    "-p",
                    "pytest_timeout",
                    "--timeout=0",
                    "--no-header",
                    *tests,
                ]
            )
        )
    finally:
        sys.stdout.flush()
        os._exit(code)


def _quick_hypothesis() -> None:
    """The same examples each time, and no search for the smallest one that fails."""
    from hypothesis import HealthCheck, Phase, settings

    phases = (Phase.explicit, Phase.generate)
    checks = (HealthCheck.too_slow,)
    settings.register_profile("mutants", phases=phases, database=None, derandomize=True, suppress_health_check=checks)
    settings.load_profile("mutants")


def _interpret_intrinsics() -> None:
    """Numba's interpreter has no intrinsics; those of the sources have a name and a meaning."""
    import numba.extending

    plain: dict[str, Callable[[int], int]] = {
        "popcount": lambda bits: int(bits).bit_count(),
        "lowest_bit": lambda bits: (int(bits) & -int(bits)).bit_length() - 1,
    }

    def intrinsic(function: Callable[..., object]) -> Callable[..., object]:
        return plain.get(function.__name__, function)

    numba.extending.intrinsic = intrinsic


if __name__ == "__main__":
    assert Path("pyproject.toml").exists(), "run in a tree of the project"
    main()
