"""A benchmark that is stopped from outside leaves no process behind, not even one that it had paused."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common import ROOT
from benchmarks.processes import AtExit, run_tied, tied

LIMIT_S = 60.0

# An engine_side without an engine; its model's folder gets its pid and its child's.
ENGINE = """
import os, subprocess, sys
from pathlib import Path
child = subprocess.Popen(["sleep", "600"])
Path(sys.argv[2], sys.argv[1]).write_text(f"{os.getpid()} {child.pid}")
print("{}", flush=True)
child.wait()
"""
BENCHMARK = """
import signal, sys
from pathlib import Path
from benchmarks.serving import decode_throughput
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit one that ignores it
engine, folder = sys.argv[1:]
decode_throughput.ENGINE_SIDE = (sys.executable, "-c", engine)
with (
    decode_throughput.started("vllm", Path(folder), "float32"),
    decode_throughput.started("mesh", Path(folder), "float32"),
):
    print("ready", flush=True)
    signal.pause()
"""
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); signal.pause()"


def wait_until_gone(descriptors: list[int]) -> None:
    """Wait for the processes behind some pidfds."""
    for descriptor in descriptors:
        ended, _, _ = select.select([descriptor], [], [], LIMIT_S)
        os.close(descriptor)
        assert ended


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_paused_sides_end_with_the_benchmark(tmp_path: Path, number: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BENCHMARK, ENGINE, str(tmp_path)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as benchmark:  # fmt: skip
        assert benchmark.stdout is not None
        assert benchmark.stdout.readline() == "ready\n"
        pids = [int(pid) for name in ("vllm", "mesh") for pid in (tmp_path / name).read_text().split()]
        assert len(pids) == 4
        descriptors = [os.pidfd_open(pid) for pid in pids]
        benchmark.send_signal(number)
        try:
            assert benchmark.wait(LIMIT_S) != 0
        finally:
            benchmark.kill()
        wait_until_gone(descriptors)


def test_a_process_that_ignores_sigterm_is_killed() -> None:
    with tied([sys.executable, "-c", STUBBORN], grace_s=0.2, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    assert process.returncode == -signal.SIGKILL


def test_children_end_with_the_context() -> None:
    with tied(["sh", "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        descriptor = os.pidfd_open(int(process.stdout.readline()))
    wait_until_gone([descriptor])


def test_a_command_past_its_time_is_ended() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run_tied(["sleep", "600"], timeout_s=0.1)


def test_what_ends_by_itself_keeps_its_status_and_output() -> None:
    done = run_tied(["sh", "-c", "echo out; echo err >&2; exit 3"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_a_script_that_was_cancelled_does_not_run(tmp_path: Path) -> None:
    dropped, wanted = tmp_path / "dropped", tmp_path / "wanted"
    AtExit('touch "$1"', str(dropped)).cancel()
    script = AtExit('touch "$1"', str(wanted))
    script.run()
    script.wait(LIMIT_S)
    assert wanted.exists()
    assert not dropped.exists()
