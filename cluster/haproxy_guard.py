"""HAProxy must not outlive its cluster: Ray kills the actor that started it, and HAProxy itself would keep the port."""

from __future__ import annotations

import subprocess
from pathlib import Path

# Waits for the end of the process that holds its standard input, and for what that one does at its end.
_SCRIPT = """
read -r _
for process in /proc/[0-9]*; do
  tr '\\0' ' ' < "$process/cmdline" 2>/dev/null | grep -qF "haproxy -db -f $GUARDED/" && kill -KILL "${process#/proc/}"
done
rm -rf "$GUARDED"
"""


class HAProxyGuard:
    """Ends every HAProxy whose config is in `folder`, and removes the folder, once this process is gone or closes it.

    A shell in a session of its own reads from a pipe; the kernel closes the pipe together with this process.
    """

    def __init__(self, folder: Path) -> None:
        self._shell = subprocess.Popen(
            ["sh", "-c", _SCRIPT],
            env={"PATH": "/usr/bin:/bin", "GUARDED": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def close(self, timeout_s: float = 10.0) -> None:
        """Do it now. Raises subprocess.TimeoutExpired."""
        assert self._shell.stdin is not None
        self._shell.stdin.close()
        self._shell.wait(timeout_s)
