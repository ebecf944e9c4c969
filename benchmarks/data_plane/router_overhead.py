"""A router's own work in a MoE layer, without wire and experts: plan, pack, unpack, combine.

    python -m benchmarks.data_plane.router_overhead [--quick] [--tracing]

One core, 4 shards, 64 tokens, top-8, hidden 512, float32 and bf16: the time of a whole dispatch, Python included, with
links that answer immediately. Goal: a median of at most 25 microseconds for 64 tokens in bfloat16.
`benchmarks.data_plane.round_trip` measures round trips. `--tracing`: what tracing adds, with the sides taking turns.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from benchmarks.common import median, print_table, save
from experts.dispatch.layer_shape import LayerShape
from experts.dispatch.loopback import loopback_dispatcher
from experts.dispatch.tracing.dispatcher import TracedDispatcher

OVERHEAD_GOAL_US = 25.0


def measure_overhead(dtype: torch.dtype, tokens: int, ranks: int, runs: int) -> dict[str, Any]:
    """One row: median microseconds of a whole begin and finish with links that answer immediately."""
    shape = LayerShape(num_layers=1, num_experts=64, top_k=8, hidden_size=512, dtype=dtype)
    dispatcher = loopback_dispatcher(shape, ranks, tokens)
    x_TD = torch.randn(tokens, 512).to(dtype)
    ids_TK = torch.stack([torch.randperm(64)[:8] for _ in range(tokens)]).int()
    weights_TK = torch.rand(tokens, 8)
    times, plans, combines = [], [], []
    for _ in range(runs):
        before = (dispatcher.stats.plan_pack.sum_ns, dispatcher.stats.combine.sum_ns)
        start_ns = time.perf_counter_ns()
        dispatcher.forward(0, x_TD, weights_TK, ids_TK)
        times.append((time.perf_counter_ns() - start_ns) / 1000)
        plans.append((dispatcher.stats.plan_pack.sum_ns - before[0]) / 1000)
        combines.append((dispatcher.stats.combine.sum_ns - before[1]) / 1000)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens,
        "shards": ranks,
        "plan_pack_us": median(plans),
        "combine_us": median(combines),
        "total_us": median(times),
        "goal_us": OVERHEAD_GOAL_US,
    }


def measure_tracing(tokens: int, ranks: int, rounds: int) -> dict[str, Any]:
    """One row: median microseconds of a layer without tracing, with it between traced steps, and in a traced one."""
    shape = LayerShape(num_layers=1, num_experts=64, top_k=8, hidden_size=512, dtype=torch.bfloat16)
    off = loopback_dispatcher(shape, ranks, tokens)
    on = loopback_dispatcher(shape, ranks, tokens, TracedDispatcher)
    assert isinstance(on, TracedDispatcher)
    x_TD, weights_TK = torch.randn(tokens, 512).bfloat16(), torch.rand(tokens, 8)
    ids_TK = torch.stack([torch.randperm(64)[:8] for _ in range(tokens)]).int()
    times: dict[str, list[float]] = {"off_us": [], "on_us": [], "traced_us": []}
    for _ in range(rounds):
        for side, found in times.items():
            dispatcher = off if side == "off_us" else on
            for _ in range(20):
                if side == "traced_us":
                    on.start_step({}, 1)
                start_ns = time.perf_counter_ns()
                dispatcher.forward(0, x_TD, weights_TK, ids_TK)
                found.append((time.perf_counter_ns() - start_ns) / 1000)
                on.end_step()
    return {"tokens": tokens, "shards": ranks, **{side: median(found) for side, found in times.items()}}


def main() -> None:
    """Print the table and write bench-results/router_overhead.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tracing", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.tracing:
        rows = [
            measure_tracing(tokens, ranks, 10 if args.quick else 200) for tokens, ranks in ((1, 4), (64, 4), (64, 8))
        ]
        print_table("A MoE layer with and without tracing", list(rows[0]), [list(row.values()) for row in rows])
        save("tracing", {"tracing": rows})
        return
    runs = 200 if args.quick else 3000
    rows = [
        measure_overhead(dtype, tokens, ranks, runs)
        for dtype in (torch.bfloat16, torch.float32)
        for tokens, ranks in ((1, 4), (16, 4), (64, 4), (256, 4), (64, 2), (64, 8))
    ]
    print_table(
        "Router overhead per MoE layer, hidden 512, top-8 of 64 experts, median microseconds",
        list(rows[0]),
        [list(row.values()) for row in rows],
    )
    save("router_overhead", {"overhead": rows})


if __name__ == "__main__":
    main()
