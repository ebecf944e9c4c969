"""Requests packed by hand, for tests that talk to a shard without a router."""

from __future__ import annotations

import numpy as np
import torch

from experts.protocol.wire import (
    DTYPE_CODES,
    H_DTYPE,
    H_HIDDEN,
    H_LAYER,
    H_MAGIC,
    H_PAIRS,
    H_ROWS,
    H_SEQ,
    MAGIC,
    header_of,
    request_layout,
)

HIDDEN = 24
ROW_BYTES = 4 * HIDDEN


def pack(buffer: np.ndarray, seq: int, experts: list[int], layer: int = 0, x_D: torch.Tensor | None = None) -> int:
    """Pack one row for `experts`, each with weight 1, into `buffer`; returns the length in bytes."""
    offsets_at, experts_at, weights_at, rows_at, nbytes = request_layout(1, len(experts), ROW_BYTES)
    header = header_of(buffer)
    header[:] = 0
    header[H_MAGIC], header[H_SEQ], header[H_LAYER] = MAGIC, seq, layer
    header[H_ROWS], header[H_PAIRS] = 1, len(experts)
    header[H_DTYPE], header[H_HIDDEN] = DTYPE_CODES[torch.float32], HIDDEN
    buffer[offsets_at : offsets_at + 8].view(np.int32)[:] = [0, len(experts)]
    buffer[experts_at : experts_at + 4 * len(experts)].view(np.int32)[:] = experts
    buffer[weights_at : weights_at + 4 * len(experts)].view(np.float32)[:] = 1
    row = torch.ones(HIDDEN) if x_D is None else x_D
    buffer[rows_at:nbytes].view(np.float32)[:] = row.numpy()
    return nbytes
