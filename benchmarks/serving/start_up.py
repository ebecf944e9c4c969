"""From the command to the first token, and what the idle service holds in memory; vLLM's own server beside it.

    python -m benchmarks.serving.start_up [--turns 3]

The sides start in turns, each on the whole machine, with warm caches. Memory is proportional (PSS: a page that several
processes share counts once); what `ps` shows as resident is printed beside it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import median, print_table, save
from benchmarks.serving.front_door import mesh_command, started, vllm_command, vllm_environment
from cluster.serve_environment import free_ports

START_GOAL = 1.5  # times vLLM's server
TOTAL_GOAL_GB, CONSOLE_GOAL_MB, CONTROLLER_GOAL_MB = 5.5, 250, 250


@dataclass(frozen=True)
class Process:
    """One process of a side."""

    name: str
    rss_mb: float
    pss_mb: float


def processes_below(pid: int) -> list[Process]:
    """A process and all that descend from it."""
    return [_measured(found) for found in _tree(pid)]


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            yield from _tree(int(child))


def _measured(pid: int) -> Process:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").split()
    named = [Path(word).name for word in words[:2]] if words[:1] and "python" in words[0] else words[:1]
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    rss, pss = (int(fields[name].split()[0]) / 1000 for name in ("Rss", "Pss"))
    return Process(" ".join(named)[:60], rss, pss)


def one_start(side: str, folder: Path) -> tuple[float, list[Process]]:
    """(seconds to the first token, processes ten seconds later)."""
    [port] = free_ports(1)
    command, env = (
        (vllm_command(port), vllm_environment(1)) if side == "vllm" else (mesh_command(port, folder), dict(os.environ))
    )
    with started(side, command, port, env, folder / f"{side}.log") as server:
        time.sleep(10)  # what starts beside the first token has come up
        processes = processes_below(server.process.pid)
    print(f"{side}: {server.start_s:.1f} s, {sum(p.pss_mb for p in processes) / 1000:.2f} GB", flush=True)
    if side == "mesh":
        print((folder / "mesh.log").read_text())
    return server.start_s, processes


def main() -> None:
    """Start both sides in turns and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {"vllm": [], "mesh": []}
    processes: dict[str, list[Process]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(1 if args.quick else args.turns):
            for side in seconds:
                taken_s, processes[side] = one_start(side, Path(folder))
                seconds[side].append(taken_s)
    ratio = median(seconds["mesh"]) / median(seconds["vllm"])
    for side, found in processes.items():
        rows = [[p.name, p.rss_mb, p.pss_mb] for p in sorted(found, key=lambda p: -p.pss_mb)]
        total = ["total", sum(p.rss_mb for p in found), sum(p.pss_mb for p in found)]
        print_table(f"{side}, idle", ["process", "RSS MB", "PSS MB"], [*rows, total])
    print(f"\ncommand to first token: {seconds}, ratio of medians {ratio:.2f} (goal {START_GOAL})")
    print(f"goals: total {TOTAL_GOAL_GB} GB, console {CONSOLE_GOAL_MB} MB, controller {CONTROLLER_GOAL_MB} MB")
    save(
        "start_up",
        {"seconds": seconds, "ratio": ratio, "processes": {s: [vars(p) for p in f] for s, f in processes.items()}},
    )


if __name__ == "__main__":
    main()
