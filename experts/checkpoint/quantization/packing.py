"""Integers in int32 words, and what they mean with their scales.

Legend: P rows, Q columns of one expert's matrix; G scales of a row, n values in a word.
"""

from __future__ import annotations

import torch


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [..., W] to uint8 [..., W * 32 / bits] for 4 or 8 bits: a word's lowest bits are its first value."""
    # On a little-endian machine a word's bytes are in order.
    found = words.contiguous().view(torch.uint8)
    if bits == 8:
        return found
    return torch.stack([found & 0xF, found >> 4], dim=-1).flatten(-2)


def scaled(
    values_PQ: torch.Tensor,
    zeros_PG: torch.Tensor | int,
    scale_PG: torch.Tensor,
    dtype: torch.dtype,
    group_of_Q: torch.Tensor | None = None,
) -> torch.Tensor:
    """(value - zero) * scale, multiplied in float32 and rounded to `dtype`; [P, Q].

    `group_of_Q`: which scale each column has; by default equal runs of columns share one. Values and zeros are
    integers of up to 8 bits.
    """
    out_PQ = values_PQ.to(torch.float32)
    scale_PG = scale_PG.to(torch.float32)
    if group_of_Q is None:  # views: nothing is expanded in memory
        grouped_PGq = out_PQ.view(*scale_PG.shape, -1)
        grouped_PGq -= zeros_PG if isinstance(zeros_PG, int) else zeros_PG.to(torch.float32).unsqueeze(-1)
        grouped_PGq *= scale_PG.unsqueeze(-1)
        return out_PQ.to(dtype)
    of_Q = group_of_Q.to(torch.int64)
    out_PQ -= zeros_PG if isinstance(zeros_PG, int) else zeros_PG.to(torch.float32)[:, of_Q]
    out_PQ *= scale_PG[:, of_Q]
    return out_PQ.to(dtype)


def check_groups(group_of_Q: torch.Tensor, num_groups: int) -> None:
    """ValueError if a column is in a group that has no scale."""
    low, high = int(group_of_Q.min()), int(group_of_Q.max())
    if low < 0 or high >= num_groups:
        raise ValueError(f"columns are in groups {low}..{high}, expected 0..{num_groups - 1}")
