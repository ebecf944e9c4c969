"""The Triton programs that pack and combine rows. Importing this needs triton.

Legend: T tokens, K top-k, R ranks, D hidden size; BLOCK_D columns of a row for one program. For `rank_TK` and `row_TK`
see `experts.dispatch.rows.base.DispatchPlan`.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pack_rows(x_TD, rank_TK, row_TK, address_R, x_stride, D, K: tl.constexpr, BLOCK_D: tl.constexpr):
    """Copy each token's row to the messages that want it. `address_R` (int64): each rank's first row, 16-aligned.

    One program for a pair and BLOCK_D columns; most of them have something to copy.
    """
    pair = tl.program_id(0)
    row = tl.load(row_TK + pair)
    if row >= 0:
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        x = tl.load(x_TD + (pair // K).to(tl.int64) * x_stride + d, mask=d < D, other=0.0)
        address = tl.multiple_of(tl.load(address_R + tl.load(rank_TK + pair)), 16)
        tl.store(address.to(x_TD.dtype) + row.to(tl.int64) * D + d, x, mask=d < D)


@triton.jit
def combine_rows(
    rank_TK, row_TK, address_R, sum_TD, y_TD,
    y_stride, sum_stride, D,
    ADD: tl.constexpr, KEEP: tl.constexpr, K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = sum over ranks of their partial rows, in float32 and in the pairs' order; one program a token and BLOCK_D.

    ADD starts from what `sum_TD` (float32) holds, KEEP stores the unrounded sum there.
    """
    token = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    sum_row = sum_TD + token.to(tl.int64) * sum_stride + d
    if ADD:
        total += tl.load(sum_row, mask=d < D, other=0.0)
    for k in range(K):
        row = tl.load(row_TK + token * K + k)
        rank = tl.load(rank_TK + token * K + k)
        address = tl.multiple_of(tl.load(address_R + rank, mask=row >= 0, other=0), 16)
        part = address.to(y_TD.dtype) + row.to(tl.int64) * D + d
        total += tl.load(part, mask=tl.where(d < D, row, -1) >= 0, other=0.0).to(tl.float32)
    if KEEP:
        tl.store(sum_row, total, mask=d < D)
    tl.store(y_TD + token.to(tl.int64) * y_stride + d, total.to(y_TD.dtype.element_ty), mask=d < D)
