"""A memory cgroup of its own for a process, where this process may make one (mostly: root, outside of a container).

Both versions of cgroups, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html and .../cgroup-v2.html.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_GONE_S = 10.0  # a group whose last process has ended stays busy for a moment


class NoMemoryGroupError(RuntimeError):
    """No group can be made here; says why."""


@dataclass(frozen=True)
class MemoryGroup:
    """A group, for processes that are moved into it; what they held before is not counted."""

    folder: Path
    first_version: bool

    def move(self, pid: int) -> None:
        """Move a process with all its threads."""
        (self.folder / "cgroup.procs").write_text(str(pid))

    def limit(self, nbytes: int) -> None:
        """What is above is dropped from the page cache, or written out. OSError if that does not suffice."""
        (self.folder / ("memory.limit_in_bytes" if self.first_version else "memory.max")).write_text(str(nbytes))

    @property
    def kept_bytes(self) -> int:
        """Of what is counted, all but the page cache: what a limit cannot take away where nothing is swapped."""
        name = "memory.usage_in_bytes" if self.first_version else "memory.current"
        told = self._told("memory.stat")
        cached = told["cache" if self.first_version else "file"] - told["shmem"]
        return int((self.folder / name).read_text()) - cached

    @property
    def times_limited(self) -> int:
        """How often memory was wanted that the limit forbids."""
        if self.first_version:
            return int((self.folder / "memory.failcnt").read_text())
        return self._told("memory.events")["max"]

    def _told(self, name: str) -> dict[str, int]:
        words = (line.split() for line in (self.folder / name).read_text().splitlines())
        return {key: int(value) for key, value in words}


@contextmanager
def memory_group() -> Iterator[MemoryGroup]:
    """A group below that of this process, which goes at the end: its processes have ended by then.

    Raises NoMemoryGroupError.
    """
    group = _make()
    try:
        yield group
    finally:
        deadline_s = time.monotonic() + _GONE_S
        while True:
            try:
                group.folder.rmdir()
                break
            except OSError:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.01)


def why_no_group() -> str | None:
    """Why `memory_group` would raise here; None if it would not."""
    try:
        with memory_group():
            return None
    except NoMemoryGroupError as error:
        return str(error)


def _make() -> MemoryGroup:
    parent, first_version = _own_folder()
    folder = parent / f"expertmesh-{secrets.token_hex(4)}"
    try:
        folder.mkdir()
    except OSError as error:
        raise NoMemoryGroupError(f"no memory cgroup can be made in {parent}: {error.strerror}") from None
    if not os.access(folder / "memory.stat", os.R_OK):  # the second version, where the parent passes no controller on
        folder.rmdir()
        raise NoMemoryGroupError(f"{parent} does not hand the memory controller to groups below it")
    return MemoryGroup(folder, first_version)


def _own_folder() -> tuple[Path, bool]:
    """(folder of this process's memory group, whether cgroups are of the first version)."""
    try:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError as error:
        raise NoMemoryGroupError(f"/proc/self/cgroup: {error.strerror}") from None
    for _, controllers, path in lines:
        if "memory" in controllers.split(","):
            return _ROOT / "memory" / path.lstrip("/"), True
    for _, controllers, path in lines:
        if controllers == "":
            return _ROOT / path.lstrip("/"), False
    raise NoMemoryGroupError("this process is in no memory cgroup")
