"""Many routers and shards that come and go for a while: right rows, and nothing that grows.

    python -m benchmarks.data_plane.soak [--quick] [--minutes 10] [--routers 16] [--shards 8] [--seed 0]

Each is a process. Routers dispatch all the time, every other one over shared memory, the rest over TCP, and compare
each row with float64. All the while one shard or router at a time is killed (SIGKILL) and replaced, and routers are
told; every expert is on two shards. The first shard and two routers, one of each transport, are never killed: their
memory, threads and descriptors are read throughout. Memory is the PSS without pages of files. Exit status 1 if a row
was wrong, a router failed, or a survivor grew by more than `GROWTH`.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import print_table, save
from experts.protocol.membership import Membership
from experts.protocol.secret import share_by_environment
from tests.support.small_mesh import (
    TOLERANCE,
    Batch,
    Mesh,
    forked_context,
    make_router,
    oracle,
    random_batch,
    replicated,
    start_shards,
    write_checkpoint,
)

LAYERS, EXPERTS = 2, 16
BATCHES = (1, 3, 8, 16)  # tokens
ANSWER_S = 600.0  # of a router: generous, as all of them share few cores
REST_S = 0.002  # of a router after each layer, or those that run would keep others from starting
WARM_UP = 0.2  # of the time, before growth counts: caches fill, buffers are taken
PAUSE_S = 0.25  # between two changes
SURVIVING_SHARDS, SURVIVING_ROUTERS = 1, 2


@dataclass(frozen=True)
class Use:
    """What a process takes."""

    memory_mb: float  # its share of pages that no file backs
    threads: int
    descriptors: int

    @classmethod
    def of(cls, pid: int) -> Use:
        """Of a live process."""
        pages = {}
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, kib = line.split()[:2]
            pages[name] = int(kib)
        kib = pages["Pss_Anon:"] + pages["Pss_Shmem:"]
        return cls(kib / 1024, len(os.listdir(f"/proc/{pid}/task")), len(os.listdir(f"/proc/{pid}/fd")))


GROWTH = Use(8.0, 0, 0)
"""Of a survivor, from the end of the warm-up to the end. Threads and descriptors are compared at rest."""


@dataclass
class Tally:
    """What a router has done."""

    layers: int = 0
    rows: int = 0
    wrong: int = 0
    failovers: int = 0
    problem: str = ""


@dataclass
class Routed:
    """A router's process as the soak sees it."""

    process: Any
    pipe: Any
    tally: Tally = field(default_factory=Tally)

    def ask(self) -> None:
        """Take in its tally. RuntimeError if it does not answer."""
        self.pipe.send(None)
        self.take()

    def take(self) -> None:
        """Its answer to the last thing it was told."""
        if not self.pipe.poll(ANSWER_S):
            raise RuntimeError(f"router {self.process.pid} did not answer in {ANSWER_S:g} s")
        self.tally = self.pipe.recv()


def route(model: Path, transport: str, expected: list[tuple[int, Batch, torch.Tensor]], pipe: Any) -> None:
    """Process body: dispatches until the pipe closes. Takes memberships, and tells its tally after each message."""
    torch.set_num_threads(1)
    router, tally = make_router(model, transport=transport, spin_us=20.0), Tally()
    try:
        router.apply_membership(pipe.recv())
        pipe.send(tally)
        while True:
            if pipe.poll(0):
                news = pipe.recv()
                if isinstance(news, Membership):
                    router.apply_membership(news)
                tally.failovers = router.dispatcher.stats.failovers
                pipe.send(tally)
            layer, batch, right_TD = expected[tally.layers % len(expected)]
            y_TD = router.finish(router.begin(layer, batch.x_TD, batch.weights_TK, batch.ids_TK))
            near_TD = torch.isclose(y_TD.double(), right_TD, **TOLERANCE)
            tally.layers += 1
            tally.rows += len(right_TD)
            tally.wrong += int((~near_TD.all(1)).sum())
            time.sleep(REST_S)
    except EOFError:
        pass
    except Exception as error:
        tally.problem = repr(error)
        pipe.send(tally)
    router.close()


class Soak:
    """The processes. A context manager."""

    def __init__(self, folder: Path, routers: int, shards: int, seed: int, spec: dict[str, Any]) -> None:
        model = write_checkpoint(folder / "model", num_layers=LAYERS, num_experts=EXPERTS)
        placement = replicated(LAYERS, EXPERTS, shards, 2)
        self._spec = spec
        self.mesh = Mesh(model, placement, start_shards(model, placement, **spec))
        batches = [random_batch(tokens, num_experts=EXPERTS, seed=tokens) for tokens in BATCHES]
        self._expected = [
            (layer, batch, oracle(self.mesh.checkpoint, layer, batch)) for layer in range(LAYERS) for batch in batches
        ]
        self._random = random.Random(seed)
        self.past: list[Tally] = []  # of routers that were killed
        self.kills = {"routers": 0, "shards": 0}
        self.routers = [self._start_router(number) for number in range(routers)]
        for router in self.routers:
            router.take()

    def __enter__(self) -> Soak:
        return self

    def __exit__(self, *exc: object) -> None:
        for router in self.routers:
            router.process.kill()
            router.process.join(ANSWER_S)
        self.mesh.close()

    def _start_router(self, number: int) -> Routed:
        ours, theirs = forked_context().Pipe()
        arguments = (self.mesh.model, ("shm", "tcp")[number % 2], self._expected, theirs)
        process = forked_context().Process(target=route, args=arguments, daemon=True)
        process.start()
        theirs.close()
        ours.send(self.mesh.membership())
        return Routed(process, ours)

    def _tell(self, without: tuple[int, ...] = ()) -> None:
        """Every router goes to the next epoch."""
        self.mesh.epoch += 1
        for router in self.routers:
            router.pipe.send(self.mesh.membership(without=without))
        for router in self.routers:
            router.take()

    def change(self) -> None:
        """Kill a shard or a router, and start another in its place."""
        if self._random.random() < 0.5:
            rank = self._random.randrange(SURVIVING_SHARDS, len(self.mesh.shards))
            self.mesh.shards[rank].end()
            if self._random.random() < 0.5:  # else routers find out, and are told of the next one alone
                self._tell(without=(rank,))
            self.mesh.restart(rank, **self._spec)
            self._tell()
            self.kills["shards"] += 1
        else:
            number = self._random.randrange(SURVIVING_ROUTERS, len(self.routers))
            lost = self.routers[number]
            lost.ask()
            lost.process.kill()
            lost.process.join(ANSWER_S)
            lost.pipe.close()
            self.past.append(lost.tally)
            self.routers[number] = self._start_router(number)
            self.routers[number].take()
            self.kills["routers"] += 1

    def survivors(self) -> dict[str, int]:
        """Process ids by name."""
        shards = {f"shard {rank}": self.mesh.shards[rank].endpoint.pid for rank in range(SURVIVING_SHARDS)}
        ways = ("shm", "tcp")
        return {**shards, **{f"router over {ways[n]}": self.routers[n].process.pid for n in range(SURVIVING_ROUTERS)}}

    def tallies(self) -> list[Tally]:
        """Of all routers that ever were."""
        for router in self.routers:
            router.ask()
        return self.past + [router.tally for router in self.routers]


def samples(soak: Soak, seconds: float, progress: Callable[[str], None]) -> Iterator[tuple[float, dict[str, Use]]]:
    """Change after change; after each the time (0 to 1) and what the survivors take."""
    start_s = told_s = time.monotonic()
    while (passed_s := time.monotonic() - start_s) < seconds:
        soak.change()
        time.sleep(PAUSE_S)
        yield passed_s / seconds, {name: Use.of(pid) for name, pid in soak.survivors().items()}
        if time.monotonic() - told_s > 60:
            told_s = time.monotonic()
            progress(f"{passed_s:.0f} s: {soak.kills}")


def run(
    routers: int, shards: int, seconds: float, seed: int = 0, progress: Callable[[str], None] = print, **spec: Any
) -> dict[str, Any]:
    """Rows, wrong ones, problems, kills, and the use of each survivor after the warm-up and at the end."""
    share_by_environment()
    with tempfile.TemporaryDirectory() as folder, Soak(Path(folder), routers, shards, seed, spec) as soak:
        seen: list[tuple[float, dict[str, Use]]] = list(samples(soak, seconds, progress))
        tallies = soak.tallies()
        kills = dict(soak.kills)
    warm = [uses for when, uses in seen if when >= WARM_UP] or [seen[-1][1]]
    return {
        "routers": routers,
        "shards": shards,
        "seconds": seconds,
        "kills": kills,
        "layers": sum(tally.layers for tally in tallies),
        "rows": sum(tally.rows for tally in tallies),
        "wrong": sum(tally.wrong for tally in tallies),
        "failovers": sum(tally.failovers for tally in tallies),
        "problems": [tally.problem for tally in tallies if tally.problem],
        "survivors": [{"process": name, **grown([uses[name] for uses in warm])} for name in (warm[0] if warm else ())],
    }


def grown(uses: list[Use]) -> dict[str, Any]:
    """First and last figures of a process; single samples waver, so each is the median of a tenth of them."""
    count = max(len(uses) // 10, 1)
    found: dict[str, Any] = {}
    for name in ("memory_mb", "threads", "descriptors"):
        values = [getattr(use, name) for use in uses]
        first, last = sorted(values[:count])[count // 2], sorted(values[-count:])[count // 2]
        found |= {name: first, f"{name}_end": last, f"{name}_most": max(values)}
    found["flat"] = all(found[f"{name}_end"] - found[name] <= getattr(GROWTH, name) for name in vars(GROWTH))
    return found


def main() -> int:
    """Print the tables and write bench-results/soak.json. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--routers", type=int, default=16)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    size = (3, 3, 10.0) if args.quick else (args.routers, args.shards, args.minutes * 60)
    found = run(*size, seed=args.seed, kernel="native")
    survivors = found["survivors"]
    print_table("Survivors", list(survivors[0]), [list(row.values()) for row in survivors])
    print({name: value for name, value in found.items() if name != "survivors"})
    save("soak", found)
    return int(bool(found["wrong"] or found["problems"] or not all(row["flat"] for row in survivors)))


if __name__ == "__main__":
    sys.exit(main())
