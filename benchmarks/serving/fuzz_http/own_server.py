"""The server of this folder in a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from benchmarks.processes import tied

ROOT = Path(__file__).parents[3]
START_TIMEOUT_S = 400.0  # a cold import of vllm on a busy machine
ENGINE_OPTIONS = (
    "--served-model-name=tiny-moe",
    "--enforce-eager",
    "--max-num-seqs=32",
    "--max-model-len=256",
    "--dtype=float32",
)


@contextlib.contextmanager
def own_server(*options: str, engine_options: tuple[str, ...] = ENGINE_OPTIONS) -> Iterator[str]:
    """The URL of a started server. AssertionError with the end of its log if it does not start."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "benchmarks.serving.fuzz_http.server", *options, *engine_options]
    with (
        tempfile.NamedTemporaryFile(suffix=".log") as log,
        tied(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log) as process,
    ):
        yield _url_of(process, Path(log.name))


def _url_of(process: subprocess.Popen[str], log: Path) -> str:
    found: list[str] = []
    there = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:  # to its end, so that the pipe never fills
            lines = [*lines[-60:], line]
            if line.startswith("http://"):
                found.append(line.strip())
                there.set()
        if not found:
            log.open("a").writelines(lines)
        there.set()

    threading.Thread(target=read, daemon=True).start()
    in_time = there.wait(START_TIMEOUT_S)
    assert found, f"no server {'came up' if in_time else f'within {START_TIMEOUT_S} s'}:\n{log.read_text()[-4000:]}"
    return found[0]
