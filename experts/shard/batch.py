"""Requests of several routers for one layer in one call of the kernel, so that weights are read once.

For kernels and pairs that C++ does not serve, those of GPUs above all; `native/shard.h` does the same for the others.

Legend: M rows, D hidden size, N (row, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from experts.kernels import ExpertKernel
from experts.shard.compiled import MAX_MERGED_ROWS
from experts.shard.request import Request
from experts.transports.base import ShardChannel


@dataclass(frozen=True, eq=False)
class Work:
    """A checked request. `rows_MD` and `out_MD` view its channel's buffers, on the host or on the shard's GPU."""

    channel: ShardChannel
    request: Request
    rows_MD: torch.Tensor
    out_MD: torch.Tensor


def batches(works: Sequence[Work]) -> Iterator[list[Work]]:
    """What to compute together: one layer, in the order given, MAX_MERGED_ROWS rows or a request that has more."""
    open_batches: dict[int, list[Work]] = {}
    for work in works:
        layer = work.request.layer
        batch = open_batches.setdefault(layer, [])
        if batch and sum(each.request.num_rows for each in batch) + work.request.num_rows > MAX_MERGED_ROWS:
            yield batch
            batch = open_batches[layer] = []
        batch.append(work)
    yield from open_batches.values()


def compute(kernel: ExpertKernel, device: torch.device, works: Sequence[Work]) -> None:
    """Fill `out_MD` of works of one layer. One whose buffers are on `device`, the kernel's, is not copied."""
    if len(works) == 1 and works[0].rows_MD.device.type == device.type:
        _forward(kernel, [works[0].request], works[0].rows_MD, works[0].out_MD)
        return
    rows_MD = torch.cat([work.rows_MD.to(device) for work in works])
    out_MD = torch.empty_like(rows_MD)
    _forward(kernel, [work.request for work in works], rows_MD, out_MD)
    for work, part_MD in zip(works, out_MD.split([work.request.num_rows for work in works]), strict=True):
        work.out_MD.copy_(part_MD)


def _forward(kernel: ExpertKernel, requests: Sequence[Request], rows_MD: torch.Tensor, out_MD: torch.Tensor) -> None:
    offsets_M1, slots_N, weights_N = requests[0].row_offsets_M1, requests[0].slots_N, requests[0].weights_N
    if len(requests) > 1:
        before = np.cumsum([0, *(len(each.slots_N) for each in requests)])
        later = [each.row_offsets_M1[1:] + start for each, start in zip(requests, before, strict=False)]
        offsets_M1 = np.concatenate([[0], *later]).astype(np.int32)
        slots_N = np.concatenate([each.slots_N for each in requests])
        weights_N = np.concatenate([each.weights_N for each in requests])
    kernel.forward(
        requests[0].layer,
        rows_MD,
        torch.from_numpy(offsets_M1),
        torch.from_numpy(slots_N),
        torch.from_numpy(weights_N),
        out_MD,
    )
