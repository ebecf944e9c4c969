"""Experts that move, and shards that come and go, under endless streams: what clients notice.

    python -m benchmarks.serving.live_experts [--streams 32] [--repeats 10] [--quick]

One router and three shards of the tiny model on a Ray cluster of their own.

    moves   a quarter of all slots gets other experts, again and again, in turns with pauses of the same length: gaps
            between tokens while experts move against those while they do not, same run
    scale   3 -> 5 -> 3 shards by deploys, `--repeats` times: what fails, which processes stay, how even the load is,
            tokens/s at worst against before, and how long a new shard takes until it computes rows

Goals: no failed request, no changed token; p99 while experts move 1.15 times that while they do not, longest gap three
steps; balancedness 0.9, tokens/s never below 0.7 of before, a new shard of use within 10 s of its process being up.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import TINY_MODEL, median, percentile, print_table, real_prompts, save
from benchmarks.serving.endless_streams import Streams, Window
from benchmarks.serving.service import OUTCOME_TIMEOUT_S, Service
from cluster.haproxy_guard import HAProxyGuard
from cluster.mesh.messages import ControllerStatus
from experts.protocol.status import RouterStatus
from placement.placement import Placement

MOVED_SHARE = 0.25
WINDOW_S = 10.0
SETTLE_S = 240.0
LOOK_S = 0.2


class Mesh:
    """The controller and the routers of the service that runs in this process' cluster."""

    def __init__(self) -> None:
        from ray import serve

        self._controller = serve.get_app_handle("experts")
        self._routers = serve.get_deployment_handle("Router", "llm")

    def status(self) -> ControllerStatus:
        return self._controller.status.remote().result(timeout_s=30)

    def router(self) -> RouterStatus:
        return self._routers.mesh_status.remote().result(timeout_s=30)

    def apply(self, placement: Placement) -> None:
        view = self._controller.apply.remote(placement, False).result(timeout_s=30)
        if not view.accepted:
            raise RuntimeError(f"the placement is refused: {view.reason}")

    def published(self) -> Placement:
        return self._controller.placement.remote().result(timeout_s=30).placement

    def wait_until_still(self, num_shards: int) -> ControllerStatus:
        """Until so many shards serve and nothing moves. RuntimeError after SETTLE_S."""
        end_s = time.monotonic() + SETTLE_S
        while time.monotonic() < end_s:
            status = self.status()
            serving = [shard for shard in status.shards if shard.state == "serving"]
            if len(serving) == num_shards == len(status.shards) and not status.migration.moving:
                return status
            time.sleep(LOOK_S)
        raise RuntimeError(f"not still after {SETTLE_S} s: {status.migration}, {[s.state for s in status.shards]}")


def with_a_quarter_moved(placement: Placement, seed: int) -> Placement:
    """A quarter of the filled slots of each layer holds another expert; every expert keeps a slot."""
    rng = np.random.default_rng(seed)
    map_LRs = placement.physical_to_logical_map.reshape(placement.num_layers, placement.num_ranks, -1).copy()
    for row_Rs in map_LRs:
        filled = np.argwhere(row_Rs >= 0)
        wanted, moved = int(MOVED_SHARE * len(filled)), 0
        for rank, slot in filled[rng.permutation(len(filled))].tolist():
            if moved >= wanted:
                break
            # Two ranks exchange experts that the other one lacks.
            other = int(rng.choice([r for r in range(len(row_Rs)) if r != rank]))
            mine = row_Rs[rank, slot]
            theirs = [s for s, e in enumerate(row_Rs[other]) if e >= 0 and e not in row_Rs[rank]]
            if mine in row_Rs[other] or not theirs:
                continue
            other_slot = int(rng.choice(theirs))
            row_Rs[rank, slot], row_Rs[other, other_slot] = row_Rs[other, other_slot], mine
            moved += 2
    return Placement(
        placement.num_ranks, placement.num_nodes, placement.num_experts, map_LRs.reshape(placement.num_layers, -1),
        nodes=placement.nodes,
    )  # fmt: skip


def moves(mesh: Mesh, streams: Streams, turns: int) -> dict[str, Any]:
    """Gaps while experts move and while they do not, in turns."""
    still: list[Window] = []
    moving: list[Window] = []
    copies = 0
    for turn in range(turns):
        still.append(_watched_window(mesh, streams))
        before = mesh.status().migration.copies
        start_s = time.monotonic()
        applied = 0
        while time.monotonic() - start_s < WINDOW_S:
            mesh.apply(with_a_quarter_moved(mesh.published(), 100 * turn + applied))
            applied += 1
            mesh.wait_until_still(3)
        moving.append(streams.window(start_s, time.monotonic()))
        copies += mesh.status().migration.copies - before
        print(
            f"  turn {turn}: {applied} placements, gaps {_gaps(still[-1])} still, {_gaps(moving[-1])} moving",
            flush=True,
        )
    p99 = [percentile([1000 * g for w in side for g in w.gaps_s], 0.99) for side in (still, moving)]
    step = 1000 * median(g for w in still for g in w.gaps_s)
    longest = [1000 * max(w.largest_gap_s for w in side) for side in (still, moving)]
    return {
        "copies": copies,
        "failed": [why for w in moving for why in w.failed],
        "changed": sum(w.changed for w in moving),
        "requests": sum(w.requests for w in moving),
        "p99_ms": p99,
        "p99_ratio": p99[1] / p99[0],
        "step_ms": step,
        "longest_ms": longest,
        "longest_steps": [gap / step for gap in longest],
    }


def _watched_window(mesh: Mesh, streams: Streams) -> Window:
    """A window in which the status is asked for as often as while experts move."""
    start_s = time.monotonic()
    while time.monotonic() - start_s < WINDOW_S:
        mesh.wait_until_still(3)
        time.sleep(LOOK_S)
    return streams.window(start_s, time.monotonic())


def scale(service: Service, mesh: Mesh, streams: Streams, repeats: int) -> Iterator[dict[str, Any]]:
    """One row for each deploy of another number of shards."""
    before = _window(streams, WINDOW_S)
    rate = before.chunks / WINDOW_S
    for turn in range(2 * repeats):
        wanted = 5 if turn % 2 == 0 else 3
        old = {shard.pid: shard.shard_id for shard in mesh.status().shards}
        start_s = time.monotonic()
        service.deploy(lambda apps, wanted=wanted: _set_shards(apps, wanted))  # type: ignore[misc]
        useful_s = _until_useful(mesh, old) if wanted == 5 else []
        status = mesh.wait_until_still(wanted)
        done_s = time.monotonic()
        pairs = np.array(mesh.router().shard_pairs[: status.num_ranks])
        after = _window(streams, WINDOW_S)
        pairs = np.array(mesh.router().shard_pairs[: status.num_ranks]) - pairs
        window = streams.window(start_s, time.monotonic())
        new = {shard.pid: shard.shard_id for shard in status.shards}
        slowest = min(streams.window(s, s + 2).chunks / 2 for s in np.arange(start_s, done_s, 1.0))
        yield {
            "shards": wanted,
            "seconds": done_s - start_s,
            "requests": window.requests,
            "failed": window.failed,
            "changed": window.changed,
            "kept": sum(new.get(pid) == name for pid, name in old.items()),
            "balancedness": float(pairs.mean() / pairs.max()),
            "slowest_rate": slowest / rate,
            "rate_after": after.chunks / WINDOW_S / rate,
            "largest_gap_s": window.largest_gap_s,
            "useful_s": useful_s,
        }


def _until_useful(mesh: Mesh, old: dict[int | None, str]) -> list[float]:
    """For each of two new shards, the seconds from its first heartbeat as a serving process to its first row."""
    up_s: dict[int, float] = {}
    useful: dict[int, float] = {}
    end_s = time.monotonic() + SETTLE_S
    while len(useful) < 2 and time.monotonic() < end_s:
        now_s = time.monotonic()
        for shard in mesh.status().shards:
            if shard.serving and shard.pid not in old:
                up_s.setdefault(shard.rank, now_s)
        pairs = mesh.router().shard_pairs
        for rank in up_s:
            if rank < len(pairs) and pairs[rank] > 0:
                useful.setdefault(rank, time.monotonic() - up_s[rank])
        time.sleep(0.1)
    return list(useful.values())


def _set_shards(apps: dict[str, dict[str, Any]], count: int) -> None:
    for deployment in apps["experts"]["deployments"]:
        if deployment["name"] == "ExpertShard":
            deployment["num_replicas"] = count


def _with_known_loads(apps: dict[str, dict[str, Any]]) -> None:
    """Plan for a trace, so that the controller knows how much each expert is used."""
    [live] = [each["user_config"] for each in apps["experts"]["deployments"] if "user_config" in each]
    live["placement"] = {"policy": "greedy", "trace": str(TINY_MODEL / "trace.npz"), "min_replicas": 2}


def _window(streams: Streams, seconds: float) -> Window:
    start_s = time.monotonic()
    time.sleep(seconds)
    return streams.window(start_s, time.monotonic())


def _gaps(window: Window) -> str:
    gaps = [1000 * gap for gap in window.gaps_s]
    return f"p50 {percentile(gaps, 0.5):.0f} p99 {percentile(gaps, 0.99):.0f} max {max(gaps, default=0):.0f} ms"


def main() -> None:
    """Print the tables and write bench-results/live_experts.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32, help="of `moves`; `scale` has half as many")
    parser.add_argument("--turns", type=int, default=3, help="of `moves`")
    parser.add_argument("--repeats", type=int, default=10, help="of `scale`")
    parser.add_argument("--quick", action="store_true", help="one turn, one repeat")
    args = parser.parse_args()
    turns, repeats = (1, 1) if args.quick else (args.turns, args.repeats)
    result: dict[str, Any] = {"streams": args.streams}
    with contextlib.ExitStack() as stack:
        # Short: the paths of Unix sockets below it may have 107 characters.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="em-", ignore_cleanup_errors=True)))
        stack.callback(HAProxyGuard(folder).close)
        service = stack.enter_context(Service(folder).running(_with_known_loads))
        mesh = Mesh()
        prompts = real_prompts(args.streams, 32)
        with Streams(service.url, "tiny-moe", prompts, max_tokens=200).running() as streams:
            streams.wait_until_warm(OUTCOME_TIMEOUT_S)
            result["moves"] = found = moves(mesh, streams, turns)
        print_table(
            f"A quarter of all slots moved under {args.streams} streams, again and again (goals: 0, 0, 1.15, 3)",
            ["", "copies", "requests", "failed", "changed", "p99 still ms", "p99 moving ms", "ratio", "longest/step"],
            [["moves", found["copies"], found["requests"], len(found["failed"]), found["changed"], *found["p99_ms"],
              found["p99_ratio"], found["longest_steps"][1]]],
        )  # fmt: skip
        print(f"  longest gaps {found['longest_ms']} ms, step {found['step_ms']:.1f} ms; {found['failed'][:3] or ''}")
        with Streams(service.url, "tiny-moe", prompts[::2], max_tokens=200).running() as streams:
            streams.wait_until_warm(OUTCOME_TIMEOUT_S)
            rows = []
            for row in scale(service, mesh, streams, repeats):
                rows.append(row)
                print(f"  {row}", flush=True)
    result["scale"] = rows
    print_table(
        f"3 -> 5 -> 3 shards under {args.streams // 2} streams (goals: 0 failed, 0 changed, 3 kept, 0.9, 0.7, 10 s)",
        ["shards", "seconds", "requests", "failed", "changed", "kept", "balancedness", "slowest", "after", "useful s"],
        [
            [row["shards"], row["seconds"], row["requests"], len(row["failed"]), row["changed"], row["kept"],
             row["balancedness"], row["slowest_rate"], row["rate_after"], max(row["useful_s"], default=float("nan"))]
            for row in rows
        ],
    )  # fmt: skip
    save("live_experts", result)


if __name__ == "__main__":
    main()
