"""The Triton programs of quantized.py. Importing this needs triton.

Legend: P pairs sorted by slot, D hidden size, I expert intermediate size, K the dimension summed over, N the other one;
tiles as in mlp_programs.py. Weights are rows [N] of bytes along K, converted to the rows' dtype before the product:
exactly for E4M3 and FP4, rounded once for INT4. Both small float formats are widened by moving their bits to float16's
places for exponent and mantissa; the value is then right up to a power of two.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from experts.kernels.triton.mlp_programs import gated

_E4M3_FACTOR = tl.constexpr(256.0)  # 2 ** (15 - 7): the biases of float16 and E4M3
_E2M1_FACTOR = tl.constexpr(16384.0)  # 2 ** (15 - 1), likewise


@triton.jit
def _rows_of(
    x_MD, row, in_tile, x_stride, start, K, FORMAT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """x [BLOCK_P, BLOCK_K] twice for fp8_block, else its even and its odd columns."""
    k = start + tl.arange(0, BLOCK_K)
    x = tl.load(x_MD + row[:, None] * x_stride + k[None, :], mask=in_tile[:, None] & (k < K)[None, :], other=0.0)
    if FORMAT == "fp8_block":
        return x, x
    else:
        return tl.split(tl.reshape(x, (BLOCK_P, BLOCK_K // 2, 2)))


@triton.jit
def _half_bytes(
    bits, scale_GN, FORMAT: tl.constexpr, GROUPS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Float32 values [BLOCK_B, BLOCK_N] of four-bit codes (int32); BLOCK_B / GROUPS consecutive rows share a scale."""
    if FORMAT == "mxfp4":
        half = (((bits & 8) << 12) | ((bits & 7) << 9)).to(tl.int16).to(tl.float16, bitcast=True)
        values = half.to(tl.float32) * _E2M1_FACTOR
        scale = (scale_GN.to(tl.int32) << 23).to(tl.float32, bitcast=True)  # E8M0 is float32's exponent
    else:
        values = (bits - 8).to(tl.float32)
        scale = scale_GN.to(tl.float32)
    grouped = tl.reshape(values, (GROUPS, BLOCK_B // GROUPS, BLOCK_N)) * scale[:, None, :]
    return tl.reshape(grouped, (BLOCK_B, BLOCK_N))


@triton.jit
def _add_product(
    total, x0, x1, bytes_N, scales_N, in_width, start, K,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """total [BLOCK_P, BLOCK_N] + x times BLOCK_K columns of the weights' rows.

    `bytes_N`, `scales_N` point at each row's first byte and first scale. fp8_block: `x0` has all columns, and one scale
    covers this part of a row. Four bits: `x0` has the even columns, `x1` the odd ones.
    """
    if FORMAT == "fp8_block":
        k = start + tl.arange(0, BLOCK_K)
        mask = in_width[None, :] & (k < K)[:, None]
        bits = tl.load(bytes_N[None, :] + k[:, None], mask=mask, other=0).to(tl.int32)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True)
        part = tl.dot(x0, half.to(x0.dtype), input_precision=PRECISION)
        scale = tl.load(scales_N + start // GROUP, mask=in_width, other=0.0)
        total += part * (scale * _E4M3_FACTOR)[None, :]
    else:
        GROUPS: tl.constexpr = BLOCK_K // GROUP if BLOCK_K > GROUP else 1
        b = start // 2 + tl.arange(0, BLOCK_K // 2)
        g = start // GROUP + tl.arange(0, GROUPS)
        mask = in_width[None, :] & (b < K // 2)[:, None]
        both = tl.load(bytes_N[None, :] + b[:, None], mask=mask, other=0).to(tl.int32)
        in_groups = in_width[None, :] & (g < K // GROUP)[:, None]
        scale_GN = tl.load(scales_N[None, :] + g[:, None], mask=in_groups, other=0)
        w0 = _half_bytes(both & 0xF, scale_GN, FORMAT, GROUPS, BLOCK_K // 2, BLOCK_N).to(x0.dtype)
        w1 = _half_bytes(both >> 4, scale_GN, FORMAT, GROUPS, BLOCK_K // 2, BLOCK_N).to(x0.dtype)
        total = tl.dot(x0, w0, total, input_precision=PRECISION)
        total = tl.dot(x1, w1, total, input_precision=PRECISION)
    return total


@triton.jit
def gate_up(
    x_MD, w13_S2IB, scale_S, b13_S2I, row_P, tiles, h_PI,
    x_stride, D, I, row_bytes, scale_rows, scale_columns, alpha, limit,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """h[p] = act(gate, up) of row row_P[p], for one tile and BLOCK_I columns.

    `scale_rows`: rows of scales of gate, and as many of up. `scale_columns`: columns of both.
    """
    tile = tl.program_id(1)
    slot = tl.load(tiles + 3 * tile).to(tl.int64)
    pair = tl.load(tiles + 3 * tile + 1) + tl.arange(0, BLOCK_P)
    in_tile = pair < tl.load(tiles + 3 * tile + 2)
    row = tl.load(row_P + pair, mask=in_tile, other=0).to(tl.int64)
    column = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    in_width = column < I
    scale_row = column // GROUP if FORMAT == "fp8_block" else column
    gate_bytes = w13_S2IB + (slot * 2 * I + column) * row_bytes
    up_bytes = gate_bytes + tl.cast(I, tl.int64) * row_bytes
    gate_scales = scale_S + (slot * 2 * scale_rows + scale_row) * scale_columns
    up_scales = gate_scales + scale_rows * scale_columns
    gate = tl.zeros((BLOCK_P, BLOCK_I), dtype=tl.float32)
    up = tl.zeros((BLOCK_P, BLOCK_I), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        x0, x1 = _rows_of(x_MD, row, in_tile, x_stride, start, D, FORMAT, BLOCK_P, BLOCK_D)
        gate = _add_product(
            gate, x0, x1, gate_bytes, gate_scales, in_width, start, D, FORMAT, GROUP, PRECISION, BLOCK_D, BLOCK_I
        )
        up = _add_product(
            up, x0, x1, up_bytes, up_scales, in_width, start, D, FORMAT, GROUP, PRECISION, BLOCK_D, BLOCK_I
        )
    if HAS_BIAS:
        bias = b13_S2I + slot * 2 * I + column
        gate += tl.load(bias, mask=in_width, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias + I, mask=in_width, other=0.0).to(tl.float32)[None, :]
    h = gated(gate, up, alpha, limit, KIND).to(h_PI.dtype.element_ty)
    tl.store(h_PI + pair.to(tl.int64)[:, None] * I + column[None, :], h, mask=in_tile[:, None] & in_width[None, :])


@triton.jit
def down(
    h_PI, w2_SDB, scale_S, b2_SD, pair_P, weight_P, tiles, y_ND,
    D, I, row_bytes, scale_rows, scale_columns,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """y[pair_P[p]] = weight * (w2 h[p] + b2) in float32, for one tile and BLOCK_D columns."""
    tile = tl.program_id(1)
    slot = tl.load(tiles + 3 * tile).to(tl.int64)
    pair = tl.load(tiles + 3 * tile + 1) + tl.arange(0, BLOCK_P)
    in_tile = pair < tl.load(tiles + 3 * tile + 2)
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_hidden = column < D
    scale_row = column // GROUP if FORMAT == "fp8_block" else column
    row_at = w2_SDB + (slot * D + column) * row_bytes
    scales = scale_S + (slot * scale_rows + scale_row) * scale_columns
    row = pair.to(tl.int64)
    y = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    for start in range(0, I, BLOCK_I):
        h0, h1 = _rows_of(h_PI, row, in_tile, I, start, I, FORMAT, BLOCK_P, BLOCK_I)
        y = _add_product(y, h0, h1, row_at, scales, in_hidden, start, I, FORMAT, GROUP, PRECISION, BLOCK_I, BLOCK_D)
    if HAS_BIAS:
        y += tl.load(b2_SD + slot * D + column, mask=in_hidden, other=0.0).to(tl.float32)[None, :]
    y *= tl.load(weight_P + pair, mask=in_tile, other=0.0)[:, None]
    target = tl.load(pair_P + pair, mask=in_tile, other=0).to(tl.int64)
    tl.store(y_ND + target[:, None] * D + column[None, :], y, mask=in_tile[:, None] & in_hidden[None, :])
