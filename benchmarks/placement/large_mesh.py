"""Migrations of a mesh of 64 shards, simulated, and what an epoch costs a mesh of 1,024.

    python -m benchmarks.placement.large_mesh

The controller's code is the real one (`cluster.mesh.mesh`); shards, routers, links and the clock are made up:
DeepSeek-V3 in FP8 (58 layers x 256 experts of 44 MB) on 8 nodes, whose shards share 25 GB/s. Seconds of a migration
are simulated, processor time is this machine's. Bytes of an epoch are those that would travel.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.common import percentile, print_table, save
from cluster.config.live_sections import LiveConfig
from cluster.mesh.planning import ModelFacts
from experts.dispatch.live_slots import LiveSlots
from experts.protocol.membership import Membership, ShardEndpoint
from placement.placement import Placement
from tests.support.simulated.mesh import SimulatedMesh

DEEPSEEK = ModelFacts(num_layers=58, num_experts=256)
EXPERT_BYTES = 3 * 7168 * 2048
NODES, SHARDS_A_NODE, NODE_BYTES_PER_S = 8, 8, 25e9
ROUND_GOAL_MS = 100.0
TIMED = ("join", "ready", "rejoin", "drain", "leave", "report", "expire", "advance", "set_target")


@dataclass
class Spent:
    """Processor time of the controller, in seconds, by round."""

    rounds: list[float]
    total: float = 0.0
    now: float = 0.0

    def watch(self, sim: SimulatedMesh) -> None:
        """Add what every call to the mesh costs from here on."""
        for name in TIMED:
            setattr(sim.mesh, name, self._timed(getattr(sim.mesh, name)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start_s = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.now += time.process_time() - start_s

        return timed

    def end_round(self) -> None:
        self.rounds.append(self.now)
        self.total += self.now
        self.now = 0.0


def simulated(slots: int) -> SimulatedMesh:
    """64 shards on 8 nodes in linear order, which serve."""
    live = LiveConfig.model_validate({"membership": {"replace_after_s": 10, "lost_after_s": 5}})
    live = live.model_copy(
        update={"migration": live.migration.model_copy(update={"max_bytes_per_s": NODE_BYTES_PER_S / SHARDS_A_NODE})}
    )
    sim = SimulatedMesh(
        NODES * SHARDS_A_NODE,
        live,
        DEEPSEEK,
        slots,
        num_routers=4,
        nodes=[f"node{n}" for n in range(NODES) for _ in range(SHARDS_A_NODE)],
        link_bytes_per_s=NODE_BYTES_PER_S / SHARDS_A_NODE,
        checkpoint_bytes_per_s=2e9,
        expert_bytes=EXPERT_BYTES,
        checks=False,
    )
    sim.run_until_still()
    return sim


def optimized(slots: int) -> Placement:
    """A stand-in for what a search gives: every expert at another place, hot ones with replicas."""
    rng = np.random.default_rng(0)
    num_ranks, usable = NODES * SHARDS_A_NODE, slots - 1
    rows = []
    for _ in range(DEEPSEEK.num_layers):
        hot = rng.choice(DEEPSEEK.num_experts, num_ranks * usable - DEEPSEEK.num_experts, replace=False)
        experts = np.concatenate([rng.permutation(DEEPSEEK.num_experts), hot])
        row = experts.reshape(usable, num_ranks).T
        rows.append(np.concatenate([row, np.full((num_ranks, 1), -1)], 1).ravel())
    return Placement(num_ranks, NODES, DEEPSEEK.num_experts, np.stack(rows))


def migrations(slots: int, quick: bool) -> list[list[Any]]:
    """Rows of the first table."""
    rows = []
    cases: list[tuple[str, Callable[[SimulatedMesh], Any]]] = [
        ("linear to optimized", lambda sim: sim.mesh.set_target(optimized(slots), "command")),
        ("64 to 72 shards", lambda sim: sim.scale(72)),
        ("a node lost for good", _lose_a_node),
    ]
    for name, act in cases[-1:] if quick else cases:
        sim = simulated(slots)
        spent = Spent([])
        spent.watch(sim)
        began_s, rounds = sim.now_s, 0
        act(sim)
        while sim.now_s - began_s < 20 or not sim.still:
            sim.step(0.05)
            if sim.mesh.conductor.counters.rounds > rounds:
                rounds = sim.mesh.conductor.counters.rounds
                spent.end_round()
                last_s = sim.now_s
            assert sim.now_s - began_s < 3600, sim.describe()
        spent.end_round()
        counters = sim.mesh.conductor.counters
        cpu_ms = [1000 * each for each in spent.rounds[1:-1]] or [1000 * each for each in spent.rounds]
        rows.append(
            [name, last_s - began_s, counters.rounds, counters.copies, counters.copied_bytes / 1e9,
             1000 * spent.rounds[0], percentile(cpu_ms, 0.5), max(cpu_ms), sim.mesh.unserved]
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def _lose_a_node(sim: SimulatedMesh) -> None:
    sim.wanted = sim.mesh.wanted = NODES * SHARDS_A_NODE - SHARDS_A_NODE
    for shard in list(sim.shards.values()):
        if shard.node_id == "node7":
            sim.kill(shard)


def epoch_costs(num_ranks: int, num_routers: int, changed: int) -> list[list[Any]]:
    """What one epoch costs, all of it and as a difference with `changed` slots."""
    rng = np.random.default_rng(1)
    slots = max(2, 2 * DEEPSEEK.num_experts // num_ranks)
    map_LS = np.full((DEEPSEEK.num_layers, num_ranks * slots), -1, np.int32)
    for row in map_LS:
        row[rng.permutation(row.size)[: 2 * DEEPSEEK.num_experts]] = np.repeat(np.arange(DEEPSEEK.num_experts), 2)
    endpoints = tuple(ShardEndpoint(rank, f"{rank:032x}", "10.0.0.1", 40000, "h" * 16, 1) for rank in range(num_ranks))
    older = Membership(1, Placement(num_ranks, 1, DEEPSEEK.num_experts, map_LS), endpoints)
    new_LS = map_LS.copy()
    free = np.argwhere(new_LS < 0)
    for layer, slot in free[rng.permutation(len(free))[:changed]].tolist():
        new_LS[layer, slot] = int(rng.integers(DEEPSEEK.num_experts))
    newer = Membership(2, Placement(num_ranks, 1, DEEPSEEK.num_experts, new_LS), endpoints)
    rows = []
    for name, told, known in (("whole", newer.to_bytes, None), ("difference", lambda: newer.delta_from(older), older)):
        make_ms, data = _timed_ms(told)
        read_ms, read = _timed_ms(lambda data=data, known=known: Membership.from_bytes(data, known))
        table_ms, _ = _timed_ms(lambda read=read: LiveSlots(read.placement))
        rows.append([num_ranks, num_routers, name, len(data) / 1e3, num_routers * len(data) / 1e6, make_ms, read_ms,
                     table_ms])  # fmt: skip
    return rows


def _timed_ms(call: Callable[[], Any]) -> tuple[float, Any]:
    """(milliseconds of processor time, best of three; what it returned)."""
    best, answer = float("inf"), None
    for _ in range(3):
        start_s = time.process_time()
        answer = call()
        best = min(best, time.process_time() - start_s)
    return 1000 * best, answer


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=6, help="slots of a layer on each shard, one of them spare")
    parser.add_argument("--quick", action="store_true", help="the last migration only")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    columns = ["case", "seconds", "rounds", "copies", "GB", "first plan ms", "round p50 ms", "round max ms", "unserved"]
    table = migrations(args.slots, args.quick)
    print_table(
        f"Migrations of 64 simulated shards (goal: {ROUND_GOAL_MS} ms of the controller a round)", columns, table
    )
    costs = [row for size in ((64, 4), (1024, 128)) for row in epoch_costs(*size, changed=64)]
    cost_columns = [
        "shards",
        "routers",
        "told",
        "KB",
        "MB to all",
        "controller ms",
        "router reads ms",
        "router tables ms",
    ]
    print_table("One epoch in which 64 slots change", cost_columns, costs)
    save("large_mesh", {"migrations": [columns, *table], "epochs": [cost_columns, *costs]})


if __name__ == "__main__":
    main()
