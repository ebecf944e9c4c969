"""Predicted against measured layers: `placement.capacity.step_cost` and the data plane of this machine.

    python -m benchmarks.data_plane.layer_cost [--quick]

Constants come first, each from its part alone: the kernel without a shard, routers on links that answer immediately,
ping-pongs of a pair less their copies. Then whole layers of routers and shards run, at other sizes than those, and each
is compared with what is predicted for its own tokens. Routers and shards are threads of this process that compute
without the GIL, on real pairs. All times are low quantiles (a tenth of the samples is quicker), since whatever else
runs on the machine only adds. Goal: an error of at most 15 %.
"""

from __future__ import annotations

import argparse
import os
import secrets
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.common import print_table, save
from benchmarks.data_plane.layer_cost.parts import (
    DRAWS,
    Shape,
    Shards,
    fit_kernel,
    fit_link,
    fit_router,
    low,
    make_kernel,
    random_ids,
)
from experts.dispatch.dispatcher import Dispatcher
from experts.kernels.native.kernel import NativeKernel
from placement.capacity.hardware import Constants, ModelShape
from placement.capacity.step_cost import step_cost
from placement.placement import Placement
from placement.topology import Link, Links, Topology
from placement.traces.trace import ActivationTrace

GOAL = 0.15
SHAPES = {
    # Weights far beyond the caches, as those of real models are, and weights that the last cache holds.
    "large": Shape(hidden=256, width=128, num_experts=64, top_k=8, num_layers=6),
    "small": Shape(hidden=128, width=64, num_experts=16, top_k=4, num_layers=4),
}


@dataclass(frozen=True)
class Case:
    """Routers with `tokens` each, on pairs of one transport with `shards` shards."""

    shape: str
    transport: str
    shards: int
    routers: int
    tokens: int


CASES = [
    *(
        Case(shape, transport, 1, 1, tokens)
        for shape in SHAPES
        for transport in ("shm", "tcp")
        for tokens in (2, 12, 48, 192)
    ),
    *(Case(shape, "shm", 2, 1, tokens) for shape in SHAPES for tokens in (12, 48)),
    *(Case("large", "shm", 1, routers, 8) for routers in (2, 4, 8)),
]


def predicted_s(case: Case, ids_DTLK: np.ndarray, constants: Constants, links: Links) -> float:
    """Seconds of a layer, the mean over sets of tokens, layers and routers."""
    shape = SHAPES[case.shape]
    costs = [
        step_cost(
            ActivationTrace(ids_TLK.astype(np.int16), shape.num_experts),
            Placement.linear(shape.num_layers, shape.num_experts, case.shards),
            model=ModelShape(shape.hidden, shape.width, 4.0, 4.0),
            constants=constants,
            topology=Topology.uniform(case.shards, links=links),
            tokens=ids_TLK.shape[0],
            router_nodes=[0] * case.routers,
            batches=1,
        )
        for ids_TLK in ids_DTLK
    ]
    return statistics.fmean(cost.step_s for cost in costs) / shape.num_layers


def measured_s(case: Case, kernels: Sequence[NativeKernel], ids_DTLK: np.ndarray, seconds: float) -> float:
    """Seconds of a layer likewise, the mean over each router's layers.

    Low quantiles; medians for several routers, which sometimes wait and sometimes do not.
    """
    shape = SHAPES[case.shape]
    with Shards(shape, kernels[: case.shards], case.transport) as shards:
        dispatchers = [shards.dispatcher(case.tokens) for _ in range(case.routers)]
        times_IC: list[list[list[float]]] = [[[] for _ in range(DRAWS * shape.num_layers)] for _ in dispatchers]
        stop_s = time.perf_counter() + seconds
        threads = [
            threading.Thread(target=_route, args=(dispatcher, ids_DTLK[:, n :: case.routers], n, stop_s, times_IC[n]))
            for n, dispatcher in enumerate(dispatchers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    typical = low if case.routers == 1 else statistics.median
    return statistics.fmean(typical(times) for times_C in times_IC for times in times_C)


def _route(
    dispatcher: Dispatcher, ids_DTLK: np.ndarray, number: int, stop_s: float, times_C: list[list[float]]
) -> None:
    num_draws, num_tokens, num_layers, top_k = ids_DTLK.shape
    x_TD, weights_TK = torch.randn(num_tokens, dispatcher.shape.hidden_size), torch.rand(num_tokens, top_k)
    ids_CTK = [
        torch.from_numpy(np.ascontiguousarray(ids_DTLK[draw, :, layer]))
        for draw in range(num_draws)
        for layer in range(num_layers)
    ]
    at = 5 * number  # routers are not in step
    while min(map(len, times_C)) < 3 or time.perf_counter() < stop_s:
        for call in ((at + step) % len(ids_CTK) for step in range(len(ids_CTK))):
            ids_TK = ids_CTK[call]
            start_s = time.perf_counter()
            dispatcher.forward(call % num_layers, x_TD, weights_TK, ids_TK)
            times_C[call].append(time.perf_counter() - start_s)


def main() -> None:
    """Print the tables and write bench-results/layer_cost.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a third of the time for each row")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ.setdefault("EXPERTMESH_SECRET", secrets.token_hex(32))
    seconds = 0.5 if args.quick else 1.5
    rng = np.random.default_rng(0)
    kernels = {name: [make_kernel(shape) for _ in range(2)] for name, shape in SHAPES.items()}
    links = {transport: fit_link(transport, seconds) for transport in ("shm", "tcp")}
    constants = {}
    for name, shape in SHAPES.items():
        of_kernel, of_router = fit_kernel(shape, kernels[name][0], 2 * seconds, rng), fit_router(shape, seconds, rng)
        constants[name] = Constants(**of_kernel, **of_router, name=f"{name}, measured", overlap=0.0)
    _print_constants(constants, links)
    rows: list[dict[str, Any]] = []
    for case in CASES:
        if len(os.sched_getaffinity(0)) < 1 + case.shards:
            print(f"  {case}: left out, every shard and a router need a core")
            continue
        tokens, shape = case.routers * case.tokens, SHAPES[case.shape]
        ids_DTLK = np.stack([random_ids(shape, tokens, rng) for _ in range(DRAWS)])
        measured = measured_s(case, kernels[case.shape], ids_DTLK, seconds)
        predicted = predicted_s(case, ids_DTLK, constants[case.shape], Links(node=links[case.transport]))
        error = predicted / measured - 1
        rows.append({
            **vars(case), "predicted_us": predicted * 1e6, "measured_us": measured * 1e6, "error": error,
            "goal": "met" if abs(error) <= GOAL else "MISSED",
        })  # fmt: skip
    print_table("A MoE layer, predicted and measured", list(rows[0]), [list(row.values()) for row in rows])
    errors = [abs(row["error"]) for row in rows]
    print(f"  error: median {statistics.median(errors):.0%}, largest {max(errors):.0%}, goal {GOAL:.0%}")
    save(
        "layer_cost",
        {
            "rows": rows,
            "constants": {name: vars(value) for name, value in constants.items()},
            "links": {name: link.model_dump() for name, link in links.items()},
        },
    )


def _print_constants(constants: dict[str, Constants], links: dict[str, Link]) -> None:
    print_table(
        "Shards and routers, one core each, float32",
        ["shape", "GB/s read", "Gflop/s", "call us", "us/row", "router us", "router us/token", "router us/row"],
        [
            [
                name, c.memory_bytes_per_s / 1e9, c.flops_per_s / 1e9, c.call_s * 1e6, c.row_s * 1e6, c.router_s * 1e6,
                c.router_token_s * 1e6, c.router_row_s * 1e6,
            ]
            for name, c in constants.items()
        ],
    )  # fmt: skip
    print_table(
        "Pairs on this host",
        ["transport", "one way us", "GB/s"],
        [[name, link.latency_s * 1e6, link.bandwidth_bytes_per_s / 1e9] for name, link in links.items()],
    )


if __name__ == "__main__":
    main()
