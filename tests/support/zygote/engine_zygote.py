"""Start engines and shards in processes of their own without paying for `import vllm` each time.

A zygote imports the libraries once and forks a child for every job, so that each engine has a process, a registry and
globals to itself. Its role, a key of its job module's `PRELOAD`, decides what it imports. Pytest's side is
`Zygote`; the other side is this module run with `-m`. It reads jobs as JSON lines from standard input, ends all
children when that closes, and writes events as JSON lines to standard output: `{"job": n, "exit": status}`, and what a
job emits.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
IMPORT_TIMEOUT_S = 240.0  # a cold import of vllm on a busy machine
JOB_TIMEOUT_S = 180.0


class Zygote:
    """Pytest's end: start jobs and await what they emit. Every wait has a time limit and shows the log if it fails."""

    def __init__(self, folder: Path, role: str, jobs: str = "parity_jobs") -> None:
        """`jobs` names a module beside this one with `JOBS` and `PRELOAD`, of which `role` is a key."""
        folder.mkdir()
        self.folder = folder
        self._events: dict[int, dict[str, Any]] = {}
        self._buffer = b""
        self._next = 0
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        with (folder / "zygote.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, role, jobs],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
            )
        self._ready = False

    def start(self, kind: str, **arguments: Any) -> int:
        """Start a job of the module's `JOBS`; returns its number."""
        if not self._ready:
            self.wait(-1, "ready", IMPORT_TIMEOUT_S)
            self._ready = True
        job = self._next
        self._next += 1
        line = json.dumps({"job": job, "kind": kind, "arguments": arguments, "log": str(self._log(job))})
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()
        return job

    def wait(self, job: int, key: str, timeout_s: float = JOB_TIMEOUT_S) -> Any:
        """What the job emits under a key, once it has."""
        deadline_s = time.monotonic() + timeout_s
        while key not in self._events.get(job, {}):
            seen = self._events.get(job, {})
            left_s = deadline_s - time.monotonic()
            if "exit" in seen or left_s <= 0 or self._process.poll() is not None:
                why = f"ended with status {seen['exit']}" if "exit" in seen else f"did not within {timeout_s} s"
                raise AssertionError(f"job {job} should emit {key!r}, but {why}:\n{self._tail(job)}")
            self._read(left_s)
        return self._events[job][key]

    def events(self, job: int) -> dict[str, Any]:
        """Everything the job has emitted so far."""
        return dict(self._events[job])

    def stop(self, job: int) -> None:
        """End a job that runs until told to stop, such as a shard."""
        os.kill(self.wait(job, "pid"), signal.SIGTERM)

    def close(self) -> None:
        """End all children and the zygote."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(20)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self, timeout_s: float) -> None:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], min(timeout_s, 1.0))[0]:
            return
        self._buffer += os.read(self._process.stdout.fileno(), 1 << 16)
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            event = json.loads(line)
            self._events.setdefault(event.pop("job"), {}).update(event)

    def _log(self, job: int) -> Path:
        return self.folder / f"job-{job}.log"

    def _tail(self, job: int) -> str:
        path = self._log(job) if self._log(job).exists() else self.folder / "zygote.log"
        return path.read_text(errors="replace")[-6000:]


def _run_child(jobs: Any, line: str, events_fd: int) -> int:
    request = json.loads(line)

    def emit(**event: Any) -> None:
        os.write(events_fd, (json.dumps({"job": request["job"], **event}) + "\n").encode())

    log = os.open(request["log"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    emit(pid=os.getpid())
    jobs.JOBS[request["kind"]](emit, **request["arguments"])
    return 0


def _lines_and_deaths(wakeup_fd: int) -> Iterator[str | None]:
    """Lines of standard input as they arrive; None when a child may have died. Ends when the input closes."""
    buffer = b""
    while True:
        ready = select.select([0, wakeup_fd], [], [])[0]
        if wakeup_fd in ready:
            os.read(wakeup_fd, 4096)
            yield None
        if 0 in ready:
            data = os.read(0, 1 << 16)
            if not data:
                return
            *lines, buffer = (buffer + data).split(b"\n")
            yield from (line.decode() for line in lines)


def main() -> None:
    events_fd = os.dup(1)
    os.dup2(2, 1)
    jobs = importlib.import_module(f"{__package__}.{sys.argv[2]}")
    jobs.PRELOAD[sys.argv[1]]()
    gc.freeze()  # engines collect garbage several times as they start; nothing loaded so far is garbage
    wakeup_read, wakeup_write = os.pipe()
    os.set_blocking(wakeup_write, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakeup_write)
    os.write(events_fd, b'{"job": -1, "ready": true}\n')
    children: dict[int, int] = {}
    for line in _lines_and_deaths(wakeup_read):
        if line is None:
            for pid in list(children):
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    event = {"job": children.pop(pid), "exit": os.waitstatus_to_exitcode(status)}
                    os.write(events_fd, (json.dumps(event) + "\n").encode())
            continue
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                status = _run_child(jobs, line, events_fd)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        children[pid] = json.loads(line)["job"]
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for pid in children:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
