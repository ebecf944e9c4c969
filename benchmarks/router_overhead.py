"""What a router does in a MoE layer besides the wire and the experts: plan, pack, unpack, combine. And the round trip.

    python -m benchmarks.router_overhead [--quick]

Overhead: one core, 4 shards, 64 tokens, top-8, hidden 512, float32 and bf16; the sum of plan+pack and combine as the
dispatcher itself does them, Python included. Goal: at most 60 microseconds in the median.

Round trip: Dispatcher.forward against real shard processes whose experts are as small as can be, over a bare ping-pong
of the same bytes between the same number of processes over the same transport. Goal: at most 1.5 times.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch

from benchmarks.common import median, print_table, save
from experts.dispatcher import Dispatcher
from experts.layer_shape import LayerShape
from experts.link import RouterLink
from experts.local_experts import LocalExperts
from experts.membership import Membership
from experts.wire import (
    DTYPE_CODES,
    H_MAGIC,
    H_ROWS,
    H_SEQ,
    HEADER_BYTES,
    MAGIC,
    header_of,
    reply_capacity,
    request_capacity,
)
from placement.tables import Placement

OVERHEAD_GOAL_US = 60.0


class EchoLink(RouterLink):
    """Answers at once with rows that are already there: what remains is the router's own work."""

    transport = "none"

    def __init__(self, rank: int, shape: LayerShape, max_rows: int) -> None:
        self.rank = rank
        self._row_bytes = shape.row_bytes
        self.send_buffer = np.zeros(request_capacity(max_rows, shape.top_k, shape.row_bytes), np.uint8)
        self.recv_buffer = np.zeros(reply_capacity(max_rows, shape.row_bytes), np.uint8)
        header_of(self.recv_buffer)[H_MAGIC] = MAGIC

    def post(self, nbytes: int) -> None:
        sent, answer = header_of(self.send_buffer), header_of(self.recv_buffer)
        answer[H_SEQ], answer[H_ROWS] = sent[H_SEQ], sent[H_ROWS]

    def wait(self, deadline_s: float) -> int:
        return HEADER_BYTES + int(header_of(self.recv_buffer)[H_ROWS]) * self._row_bytes

    def close(self) -> None:
        """Nothing is open."""


def measure_overhead(dtype: torch.dtype, tokens: int, ranks: int, runs: int) -> dict[str, Any]:
    """Median microseconds of a whole begin+finish with links that answer at once."""
    shape = LayerShape(num_layers=1, num_experts=64, top_k=8, hidden_size=512, dtype=dtype)
    assert dtype in DTYPE_CODES
    links = {rank: EchoLink(rank, shape, tokens) for rank in range(ranks)}
    dispatcher = Dispatcher(shape, tokens, 5.0, _no_fallback())
    placement = Placement.linear(1, 64, ranks)
    dispatcher.apply(Membership(1, placement, (None,) * ranks), dict(links), {})
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


def _no_fallback() -> LocalExperts:
    """A fallback that is never asked: every expert has a live shard here."""
    return None  # type: ignore[return-value]


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
        "Router overhead a MoE layer, hidden 512, top-8 of 64 experts, microseconds (median)",
        list(rows[0]),
        [list(row.values()) for row in rows],
    )
    save("router_overhead", {"overhead": rows})


if __name__ == "__main__":
    main()
