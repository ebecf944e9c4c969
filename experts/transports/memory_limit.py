"""How much memory this process may use, how much of it files may take, and whether the pairs that it may come to have
fit into that."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

_UNLIMITED = 1 << 60  # cgroups of the first version say so with a number


def memory_limit(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes: the machine's memory, or the lowest limit of this process's control groups if that is less."""
    limits = [limit for _, limit, _ in _limited_groups(proc, cgroups)]
    return min([_of_meminfo(proc / "meminfo", "MemTotal"), *limits])


def page_cache_room(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that the page cache may take, what it has included: all that no process and no limit forbids it."""
    rooms = [_of_meminfo(proc / "meminfo", "MemAvailable")]
    for folder, limit, first_version in _limited_groups(proc, cgroups):
        with contextlib.suppress(OSError, KeyError, ValueError):  # of a group that is going, or tells less
            lines = (folder / "memory.stat").read_text().splitlines()
            told = {key: int(value) for key, value in (line.split() for line in lines)}
            cached = told["cache" if first_version else "file"] - told["shmem"]
            used = int((folder / ("memory.usage_in_bytes" if first_version else "memory.current")).read_text())
            rooms.append(limit - (used - cached))
    return max(min(rooms), 0)


def _limited_groups(proc: Path, cgroups: Path) -> Iterator[tuple[Path, int, bool]]:
    """(folder, limit in bytes, whether of cgroups' first version) of each group of this process that has a limit."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from ((*found, False) for found in _limits_up_from(cgroups, path, "memory.max"))
        elif "memory" in controllers.split(","):
            found_here = _limits_up_from(cgroups / "memory", path, "memory.limit_in_bytes")
            yield from ((*found, True) for found in found_here)


def _limits_up_from(root: Path, path: str, name: str) -> Iterator[tuple[Path, int]]:
    """Of a group and those around it. Inside a container the path may be the host's, and only `root` be there."""
    folder = root / path.lstrip("/")
    while True:
        try:
            text = (folder / name).read_text().strip()
        except OSError:
            text = ""
        if text.isdigit() and int(text) < _UNLIMITED:
            yield folder, int(text)
        if folder == root or root not in folder.parents:
            return
        folder = folder.parent


def _of_meminfo(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{path} has no {name}")


class PairRoom:
    """What is left for the buffers of pairs beside everything that the process holds when this is made."""

    def __init__(self, limit_bytes: int | None = None, held_bytes: int | None = None) -> None:
        """By default the process's own limit and anonymous memory."""
        self._limit = memory_limit() if limit_bytes is None else limit_bytes
        self._held = _of_meminfo(Path("/proc/self/status"), "RssAnon") if held_bytes is None else held_bytes
        self._taken = 0
        self._lock = threading.Lock()

    def check(self, count: int, pair_bytes: int) -> None:
        """ValueError if the buffers of `count` more pairs, filled to their ends, would not fit."""
        left = max(self._limit - self._held - self._taken, 0)
        if count * pair_bytes > left:
            what = f"{count} pair{'s' if count > 1 else ''} of {pair_bytes / 1e6:.1f} MB"
            raise ValueError(
                f"{what} might not fit: {left / 1e9:.2f} GB are left of the {self._limit / 1e9:.2f} GB that this "
                "process may use; give it more memory, or lower max_rows_per_dispatch on routers and shards"
            )

    def take(self, nbytes: int) -> None:
        """Count a pair of `nbytes`. ValueError if it might not fit."""
        with self._lock:
            self.check(1, nbytes)
            self._taken += nbytes

    def give_back(self, nbytes: int) -> None:
        """A pair has ended."""
        with self._lock:
            self._taken -= nbytes
