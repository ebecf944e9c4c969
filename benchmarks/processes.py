"""Child processes that end with this one, even when it is killed and even when they are paused."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

KILL_LIMIT_S = 30.0

# Arguments: process group, tenths of a second to wait. A paused process gets the SIGTERM when it continues.
_END_GROUP = """
kill -TERM "-$1"
kill -CONT "-$1"
for _ in $(seq "$2"); do kill -0 "-$1" || exit 0; sleep 0.1; done
kill -KILL "-$1"
"""


class AtExit:
    """A shell script that runs once this process is gone, even if it was killed; `run` runs it now, `cancel` drops it.

    A shell in a session of its own reads from a pipe; the kernel closes the pipe together with this process.
    """

    def __init__(self, script: str, *arguments: str) -> None:
        self._shell = subprocess.Popen(
            ["sh", "-c", f"read -r _ && exit\n{script}", "sh", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True,
            start_new_session=True,
        )  # fmt: skip

    def run(self) -> None:
        """Start the script now; `wait` waits for its end."""
        assert self._shell.stdin is not None
        self._shell.stdin.close()

    def wait(self, timeout_s: float) -> None:
        """Wait until the shell has ended. Raises subprocess.TimeoutExpired."""
        self._shell.wait(timeout_s)

    def cancel(self) -> None:
        """End the shell without running the script."""
        self._shell.communicate("\n", timeout=KILL_LIMIT_S)


@contextlib.contextmanager
def tied(command: Sequence[str], grace_s: float = 10.0, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Start a command in a process group of its own; on the way out, or when this process dies, end the whole group.

    The group gets SIGTERM, and SIGKILL after `grace_s`. `options` are those of subprocess.Popen.
    """
    with subprocess.Popen(command, text=True, start_new_session=True, **options) as process:
        end = AtExit(_END_GROUP, str(process.pid), str(round(grace_s * 10)))
        try:
            yield process
        finally:
            end.run()
            process.wait(grace_s + KILL_LIMIT_S)
            end.wait(grace_s + KILL_LIMIT_S)


def run_tied(
    command: Sequence[str], timeout_s: float | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """subprocess.run with `tied`. Raises subprocess.TimeoutExpired after `timeout_s`; the group has ended by then."""
    with tied(command, **options) as process:
        out, err = process.communicate(timeout=timeout_s)
        return subprocess.CompletedProcess(command, process.returncode, out, err)
