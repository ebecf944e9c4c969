"""The Triton programs of mlp.py. Importing this needs triton.

Legend: N pairs, P pairs sorted by slot, D hidden size, I expert intermediate size. A tile is three int32: slot, first
sorted pair, end of the slot's sorted pairs; it covers BLOCK_P pairs from the first.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gated(gate, up, alpha, limit, KIND: tl.constexpr):
    if KIND == "silu":
        return gate * tl.sigmoid(gate) * up
    elif KIND == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    elif KIND == "gelu_tanh":  # 0.5 (1 + tanh(u)) = sigmoid(2 u)
        return gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    else:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        return gate * tl.sigmoid(alpha * gate) * (up + 1.0)


@triton.jit
def gate_up(
    x_MD, w13_S2ID, b13_S2I, row_P, weight_P, tiles, h_PI,
    x_stride, D, I, alpha, limit,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """h[p] = act(gate, up) of row row_P[p], for one tile and BLOCK_I columns; sums in float32."""
    tile = tl.program_id(0)  # the fast axis: tiles that share weights run side by side
    slot = tl.load(tiles + 3 * tile).to(tl.int64)
    pair = tl.load(tiles + 3 * tile + 1) + tl.arange(0, BLOCK_P)
    in_tile = pair < tl.load(tiles + 3 * tile + 2)
    row = tl.load(row_P + pair, mask=in_tile, other=0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    in_width = column < I
    gate_rows = w13_S2ID + slot * 2 * I * D + column.to(tl.int64)[None, :] * D
    up_rows = gate_rows + I.to(tl.int64) * D
    gate = tl.zeros((BLOCK_P, BLOCK_I), dtype=tl.float32)
    up = tl.zeros((BLOCK_P, BLOCK_I), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_MD + row[:, None] * x_stride + d[None, :], mask=in_tile[:, None] & (d < D)[None, :], other=0.0)
        if WEIGHT_ON_INPUT:
            weight = tl.load(weight_P + pair, mask=in_tile, other=0.0)
            x = (x.to(tl.float32) * weight[:, None]).to(x.dtype)
        mask = in_width[None, :] & (d < D)[:, None]
        gate = tl.dot(x, tl.load(gate_rows + d[:, None], mask=mask, other=0.0), gate, input_precision=PRECISION)
        up = tl.dot(x, tl.load(up_rows + d[:, None], mask=mask, other=0.0), up, input_precision=PRECISION)
    if HAS_BIAS:
        bias = b13_S2I + slot * 2 * I + column
        gate += tl.load(bias, mask=in_width, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias + I, mask=in_width, other=0.0).to(tl.float32)[None, :]
    h = gated(gate, up, alpha, limit, KIND).to(h_PI.dtype.element_ty)
    tl.store(h_PI + pair.to(tl.int64)[:, None] * I + column[None, :], h, mask=in_tile[:, None] & in_width[None, :])


@triton.jit
def down(
    h_PI, w2_SDI, b2_SD, pair_P, weight_P, tiles, y_ND,
    D, I,
    HAS_BIAS: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """y[pair_P[p]] = weight * (w2 h[p] + b2) in float32, for one tile and BLOCK_D columns."""
    tile = tl.program_id(0)
    slot = tl.load(tiles + 3 * tile).to(tl.int64)
    pair = tl.load(tiles + 3 * tile + 1) + tl.arange(0, BLOCK_P)
    in_tile = pair < tl.load(tiles + 3 * tile + 2)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_hidden = column < D
    w2_rows = w2_SDI + slot * D * I + column.to(tl.int64)[None, :] * I
    h_rows = h_PI + pair.to(tl.int64)[:, None] * I
    y = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    for start in range(0, I, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        h = tl.load(h_rows + i[None, :], mask=in_tile[:, None] & (i < I)[None, :], other=0.0)
        w2 = tl.load(w2_rows + i[:, None], mask=in_hidden[None, :] & (i < I)[:, None], other=0.0)
        y = tl.dot(h, w2, y, input_precision=PRECISION)
    if HAS_BIAS:
        y += tl.load(b2_SD + slot * D + column, mask=in_hidden, other=0.0).to(tl.float32)[None, :]
    if not WEIGHT_ON_INPUT:
        y *= tl.load(weight_P + pair, mask=in_tile, other=0.0)[:, None]
    target = tl.load(pair_P + pair, mask=in_tile, other=0).to(tl.int64)
    tl.store(y_ND + target[:, None] * D + column[None, :], y, mask=in_tile[:, None] & in_hidden[None, :])


@triton.jit
def sum_pairs(y_ND, row_offsets_M1, out_MD, out_stride, D, BLOCK_D: tl.constexpr):
    """out[m] = sum of y over the row's pairs, in their order, so that every run gives the same bits."""
    row = tl.program_id(0)  # there may be more rows than the 65,535 that the other axes allow
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_hidden = column < D
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for pair in range(tl.load(row_offsets_M1 + row), tl.load(row_offsets_M1 + row + 1)):
        total += tl.load(y_ND + tl.cast(pair, tl.int64) * D + column, mask=in_hidden, other=0.0)
    tl.store(out_MD + row.to(tl.int64) * out_stride + column, total.to(out_MD.dtype.element_ty), mask=in_hidden)
