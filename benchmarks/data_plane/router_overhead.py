"""A router's own work in a MoE layer, without wire and experts: plan, pack, unpack, combine.

    python -m benchmarks.data_plane.router_overhead [--quick]

One core, 4 shards, 64 tokens, top-8, hidden 512, float32 and bf16: the time of a whole dispatch, Python included, with
links that answer immediately. Goal: a median of at most 25 microseconds for 64 tokens in bfloat16.
`benchmarks.data_plane.round_trip` measures round trips.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from benchmarks.common import median, print_table, save
from experts.dispatch.layer_shape import LayerShape
from experts.dispatch.loopback import loopback_dispatcher

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


def main() -> None:
    """Print the table and write bench-results/router_overhead.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
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
