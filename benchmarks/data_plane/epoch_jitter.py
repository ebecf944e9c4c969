"""What epochs that change all day cost a router: the dispatch of a layer with an epoch every 100 ms, and without.

    python -m benchmarks.data_plane.epoch_jitter

Shards are loopback links, so that only the router's own work is timed; the epochs come as bytes, as differences that
move one expert, and are read, checked and built in the worker's thread for it, as in a service.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from experts.dispatch.connector import Connector
from experts.dispatch.dispatcher import Dispatcher
from experts.dispatch.epoch_preparer import EpochPreparer
from experts.dispatch.layer_shape import LayerShape
from experts.dispatch.loopback import LoopbackLink
from experts.protocol.membership import Membership, ShardEndpoint
from placement.placement import Placement


@dataclass(frozen=True)
class Case:
    name: str
    shape: LayerShape
    ranks: int
    tokens: int


CASES = (
    Case("tiny model, 4 shards", LayerShape(4, 16, 2, 64, torch.float32), 4, 8),
    Case("DeepSeek-V3, 64 shards", LayerShape(58, 256, 8, 7168, torch.bfloat16), 64, 32),
)


def first_epoch(case: Case) -> Membership:
    """A linear placement with a spare slot a rank and layer."""
    linear = Placement.linear(case.shape.num_layers, case.shape.num_experts, case.ranks)
    map_LRs = linear.physical_to_logical_map.reshape(case.shape.num_layers, case.ranks, -1)
    spare_LR1 = np.full((*map_LRs.shape[:2], 1), -1, np.int32)
    map_LS = np.concatenate([map_LRs, spare_LR1], 2).reshape(case.shape.num_layers, -1)
    endpoints = tuple(ShardEndpoint(rank, f"shard-{rank}", "10.0.0.1", 1, "host", 1) for rank in range(case.ranks))
    return Membership(1, Placement(case.ranks, 1, case.shape.num_experts, map_LS), endpoints)


def later_epoch(before: Membership, chance: np.random.Generator) -> Membership:
    """Another expert in one spare slot."""
    map_LS = before.placement.physical_to_logical_map.copy()
    rank, layer = chance.integers(before.placement.num_ranks), chance.integers(len(map_LS))
    map_LS[layer, (rank + 1) * before.placement.slots_per_rank - 1] = chance.integers(before.placement.num_experts)
    placement = Placement(before.placement.num_ranks, 1, before.placement.num_experts, map_LS)
    return Membership(before.epoch + 1, placement, before.endpoints)


def run(case: Case, seconds: float, every_s: float | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(us of each layer's dispatch, us of each call that comes between steps: prepare, apply; bytes of an epoch)."""
    shape, chance = case.shape, np.random.default_rng(0)
    dispatcher = Dispatcher(shape, case.tokens, 5.0, fallback=None)
    connector = Connector(lambda endpoint: LoopbackLink(endpoint.rank, shape, case.tokens))
    epochs = EpochPreparer(dispatcher, connector, prefer_local=False)
    membership = first_epoch(case)
    epochs.start(membership, None)
    epochs.wait()
    epochs.finish(1)
    x_TD = torch.zeros(case.tokens, shape.hidden_size, dtype=shape.dtype)
    weights_TK = torch.full((case.tokens, shape.top_k), 1 / shape.top_k)
    ids_TK = torch.stack([torch.randperm(shape.num_experts)[: shape.top_k] for _ in range(case.tokens)]).int()
    layers: list[float] = []
    prepares: list[float] = []
    applies: list[float] = []
    told_bytes = 0
    told = b""
    later = membership
    end_s, next_s = time.perf_counter() + seconds, time.perf_counter() + (every_s or 1e9)
    waiting = False
    while time.perf_counter() < end_s:
        for layer in range(shape.num_layers):
            start_ns = time.perf_counter_ns()
            dispatcher.forward(layer, x_TD, weights_TK, ids_TK)
            layers.append((time.perf_counter_ns() - start_ns) / 1000)
        if waiting and epochs.state().ready:
            start_ns = time.perf_counter_ns()
            epochs.finish(later.epoch)
            applies.append((time.perf_counter_ns() - start_ns) / 1000)
            membership, waiting = later, False
        elif not waiting and time.perf_counter() > next_s:
            later = later_epoch(membership, chance)  # the controller's work, not the router's
            told = later.delta_from(membership)
            told_bytes = len(told)
            start_ns = time.perf_counter_ns()
            epochs.start(told, None)
            prepares.append((time.perf_counter_ns() - start_ns) / 1000)
            waiting, next_s = True, time.perf_counter() + cast(float, every_s)
    epochs.close()
    dispatcher.close()
    return np.array(layers), np.array(prepares), np.array(applies), told_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each run dispatches")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("us of a layer's dispatch               p50      p99    p99.9      max   epochs")
    for case in CASES:
        run(case, 0.5, 0.1)
        for name, every_s in (("none", None), ("100 ms", 0.1), ("none", None), ("100 ms", 0.1)):
            layers, prepares, applies, told_bytes = run(case, options.seconds, every_s)
            figures = [*np.percentile(layers, [50, 99, 99.9]), layers.max()]
            print(f"{case.name:24} {name:>8}" + "".join(f"{us:9.0f}" for us in figures) + f"{len(applies):9}", end="")
            if len(applies):
                print(f"   prepare {np.median(prepares):.0f} us, apply {np.median(applies):.0f} us", end="")
                print(f" (max {applies.max():.0f}), {told_bytes} bytes", end="")
            print(flush=True)


if __name__ == "__main__":
    main()
