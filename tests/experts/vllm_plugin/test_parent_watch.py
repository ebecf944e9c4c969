"""An engine process ends with the process that started it, however that one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experts.vllm_plugin.parent_watch import end_with_parent
from tests.support.waiting import wait_for

# Starts an engine process as vLLM does, prints its pid, and waits to be killed.
PARENT = """
import multiprocessing, sys, time
from experts.vllm_plugin.parent_watch import end_with_parent

def engine(pipe):
    pipe.send(end_with_parent())
    time.sleep(600)

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    ours, theirs = context.Pipe()
    process = context.Process(target=engine, args=(theirs,))
    process.start()
    assert ours.recv() is True
    print(process.pid, flush=True)
    time.sleep(600)
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_a_killed_parent_takes_its_engine_along(tmp_path: Path, method: str) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen([sys.executable, str(script), method], env=env, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        engine = int(parent.stdout.readline())
        try:
            assert is_alive(engine)
            parent.send_signal(signal.SIGKILL)
            wait_for(lambda: not is_alive(engine), 20, "the end of the engine process")
        finally:
            for pid in (engine, parent.pid):
                if is_alive(pid):
                    os.kill(pid, signal.SIGKILL)


def test_a_program_with_an_engine_inside_is_left_alone() -> None:
    assert end_with_parent() is False
