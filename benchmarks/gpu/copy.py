"""Copying one expert (88 MB: DeepSeek-V3's in bfloat16) between shards while dispatches flow.

    python -m benchmarks.gpu.copy [--quick] [--device cpu]

A router dispatches 64 tokens to two shards, layer after layer: first undisturbed, then while one shard keeps sending
the other an expert over a pair of their own, in pieces of several sizes. The table has the copy's bandwidth, alone and
beside dispatches, and the dispatch's median and 99th percentile, before and during the copy.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from benchmarks.common import median, percentile
from benchmarks.gpu.common import Report, arguments
from benchmarks.gpu.peers import Pool, pool
from benchmarks.gpu.round_trip import dispatch_us
from experts.dispatch.layer_shape import LayerShape
from experts.transports.torch_groups import ROUTER, SHARD

EXPERT_BYTES = 3 * 7168 * 2048 * 2
SENDER, RECEIVER = 0, 1


def copy_rate(peers: Pool, nbytes: int, piece: int, times: int) -> float:
    """GB/s of sending `nbytes` in pieces, `times` times."""
    count = times * -(-nbytes // piece)
    peers.order(SENDER, "copy", "between", piece, count, True)
    peers.order(RECEIVER, "copy", "between", piece, count, False)
    peers.answer(SENDER)
    return piece * count / sum(peers.answer(RECEIVER)) / 1e3


def beside(peers: Pool, forward: Any, nbytes: int, piece: int, times: int) -> tuple[float, list[float]]:
    """(the copy's GB/s, microseconds of each layer that ran during it)."""
    rate: list[float] = []
    failed: list[BaseException] = []

    def copy() -> None:
        try:
            rate.append(copy_rate(peers, nbytes, piece, times))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    layers: list[float] = []
    while not layers or thread.is_alive():
        layers += dispatch_us(forward, 5, peers.device)
    if failed:
        raise failed[0]
    return rate[0], layers


def main() -> None:
    """Print the table."""
    args = arguments(__doc__)
    on_cpu = args.device == "cpu"
    report = Report("gpu_copy", args.device)
    shape = LayerShape(1, 16, 4, 64, torch.float32) if on_cpu else LayerShape(1, 256, 8, 7168, torch.bfloat16)
    tokens, nbytes = (5, 1 << 16) if on_cpu else (64, EXPERT_BYTES)
    pieces = (nbytes, nbytes // 4) if on_cpu else (nbytes, nbytes // 4, nbytes // 16)
    times, layers = (2, 10) if on_cpu else (5, 200) if args.quick else (40, 2000)
    rows = []
    try:
        with pool(args.device, 2, shape) as peers:
            peers.order(SENDER, "pair", "between", ROUTER)
            peers.order(RECEIVER, "pair", "between", SHARD)
            peers.answer(SENDER)
            peers.answer(RECEIVER)
            dispatcher = peers.dispatcher(tokens, peers.transports[0])
            x_TD = torch.randn(tokens, shape.hidden_size).to(peers.device, shape.dtype)
            ids_TK = torch.rand(tokens, shape.num_experts).argsort(1)[:, : shape.top_k].int().to(peers.device)
            weights_TK = torch.rand(tokens, shape.top_k).to(peers.device)

            def forward() -> torch.Tensor:
                return dispatcher.forward(0, x_TD, weights_TK, ids_TK)

            dispatch_us(forward, 20, peers.device)
            copy_rate(peers, nbytes, nbytes, 2)
            for piece in pieces:
                before = dispatch_us(forward, layers, peers.device)
                alone = copy_rate(peers, nbytes, piece, times)
                beside_rate, during_us = beside(peers, forward, nbytes, piece, times)
                rows.append(
                    {
                        "piece MB": piece / 1e6,
                        "copy alone GB/s": alone,
                        "beside dispatches": beside_rate,
                        "dispatch_us before": median(before),
                        "during": median(during_us),
                        "p99 before": percentile(before, 0.99),
                        "p99 during": percentile(during_us, 0.99),
                        "layers during": len(during_us),
                    }
                )
            if dispatcher.lost:
                raise RuntimeError(f"shards were lost: {dispatcher.lost}")
            dispatcher.close()
            print(f"router on {peers.device}, shards on {', '.join(peers.shard_devices)}")
    except (ValueError, RuntimeError, OSError, TimeoutError) as error:
        report.leave_out("copying an expert", f"{type(error).__name__}: {error}")
    report.table(f"An expert of {nbytes / 1e6:.0f} MB copied while {tokens} tokens a layer are dispatched", rows)
    report.end()


if __name__ == "__main__":
    main()
