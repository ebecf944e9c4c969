"""What a process may use by its control groups, and pairs that would not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from experts.transports.memory_limit import PairRoom, memory_limit, page_cache_room


def machine(folder: Path, groups: str, **limits: str) -> int:
    """The limit on a machine of 1,000 KiB; `limits` by path under /sys/fs/cgroup, with __ for a slash."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/meminfo").write_text("MemTotal:           1000 kB\nMemFree:  10 kB\n")
    (folder / "proc/self/cgroup").write_text(groups)
    for path, text in limits.items():
        file = folder / "cgroup" / path.replace("__", "/").replace("memory_", "memory.")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return memory_limit(folder / "proc", folder / "cgroup")


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/\n", {}, 1_024_000),
        ("0::/\n", {"memory_max": "5000"}, 5000),
        ("0::/\n", {"memory_max": "max"}, 1_024_000),
        ("0::/a/b\n", {"a__b__memory_max": "max", "a__memory_max": "4000", "memory_max": "9000"}, 4000),
        ("0::/the/hosts/path\n", {"memory_max": "3000"}, 3000),
        ("4:cpu,memory:/a\n0::/\n", {"memory__a__memory_limit_in_bytes": "2000"}, 2000),
        ("4:memory:/a\n", {"memory__a__memory_limit_in_bytes": "9223372036854771712"}, 1_024_000),
        ("4:memory:/gone\n", {"memory__memory_limit_in_bytes": "2500"}, 2500),
        ("0::/\n", {"memory_max": "99999999"}, 1_024_000),
        ("", {}, 1_024_000),
    ],
)
def test_the_lowest_limit_counts(tmp_path: Path, groups: str, limits: dict[str, str], expected: int) -> None:
    assert machine(tmp_path, groups, **limits) == expected


def test_this_machine_has_one() -> None:
    assert 1 << 26 < memory_limit() < 1 << 50


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {}, 600 * 1024),
        (
            "0::/a\n",
            {"a/memory.max": "9000", "a/memory.current": "5000", "a/memory.stat": "file 3000\nshmem 500"},
            6500,
        ),
        ("0::/a\n", {"a/memory.max": "9000", "a/memory.current": "9500", "a/memory.stat": "file 0\nshmem 0"}, 0),
        ("0::/a\n", {"a/memory.max": "max", "a/memory.current": "1", "a/memory.stat": "file 0\nshmem 0"}, 600 * 1024),
        (
            "4:memory:/a\n",
            {
                "memory/a/memory.limit_in_bytes": "8000",
                "memory/a/memory.usage_in_bytes": "7000",
                "memory/a/memory.stat": "cache 4000\nrss 2500\nshmem 0",
            },
            5000,
        ),
        ("0::/a\n", {"a/memory.max": "9000"}, 600 * 1024),
        ("0::/a\n", {"a/memory.max": "9000", "a/memory.current": "1", "a/memory.stat": "anon 3"}, 600 * 1024),
    ],
)
def test_files_may_have_what_nobody_else_holds(
    tmp_path: Path, groups: str, files: dict[str, str], expected: int
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:           1000 kB\nMemAvailable:  600 kB\n")
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for path, text in files.items():
        (tmp_path / "cgroup" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / path).write_text(text + "\n")
    assert page_cache_room(tmp_path / "proc", tmp_path / "cgroup") == expected


def test_pairs_are_counted_until_they_end() -> None:
    room = PairRoom(limit_bytes=10_000_000, held_bytes=1_000_000)
    room.check(3, 3_000_000)
    with pytest.raises(ValueError, match=r"4 pairs of 3\.0 MB might not fit: 0\.01 GB are left of the 0\.01 GB"):
        room.check(4, 3_000_000)
    for _ in range(3):
        room.take(3_000_000)
    with pytest.raises(ValueError, match=r"1 pair of 3\.0 MB might not fit: 0\.00 GB.*lower max_rows_per"):
        room.take(3_000_000)
    room.give_back(3_000_000)
    room.take(3_000_000)
    with pytest.raises(ValueError, match="1 pair"):
        PairRoom(limit_bytes=1 << 20).take(1)  # this process already holds more
