"""Converts stored blocks and scales to plain floats.

Legend: P rows, Q columns of one expert's matrix; p and q the same, counted in blocks.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

# The sixteen values of FP4 E2M1 (OCP Microscaling Formats 1.0, table 4): sign, 2 exponent bits, 1 mantissa bit.
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E8M0_BIAS = 127
INT4_ZERO = 8  # symmetric INT4 is stored with 8 added


@functools.cache
def _fp8_values() -> np.ndarray:
    """float32 [256]: the value of each E4M3 byte, including NaN."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).numpy()


def dequantize_fp8_block(
    weight_PQ: torch.Tensor, scale_inv_pq: torch.Tensor, block: int, dtype: torch.dtype
) -> torch.Tensor:
    """FP8 weights with one scale for each `block` x `block` square (DeepSeek-V3): `weight * scale` [P, Q].

    Multiplied in float32, then rounded to `dtype`. The last block of a row or column may be partial. `weight_PQ`:
    float8_e4m3fn or its bytes. `scale_inv_pq`: [ceil(P / block), ceil(Q / block)], any float dtype.
    """
    P, Q = weight_PQ.shape
    out_PQ = torch.empty(P, Q, dtype=dtype)
    bytes_PQ = weight_PQ.view(torch.uint8).numpy()
    scale_pQ = scale_inv_pq.to(torch.float32).repeat_interleave(block, dim=1)[:, :Q]
    for p, scale_Q in enumerate(scale_pQ):
        # One row of blocks fits the cache, and a table lookup is several times faster than torch's conversion.
        rows = slice(p * block, (p + 1) * block)
        out_PQ[rows] = torch.from_numpy(_fp8_values().take(bytes_PQ[rows])).mul_(scale_Q)
    return out_PQ


@functools.cache
def _fp4_pairs() -> torch.Tensor:
    """int32 [256]: the bits of a byte's two bfloat16 values, low nibble first."""
    values_16 = torch.tensor(FP4_VALUES, dtype=torch.bfloat16)
    byte_256 = torch.arange(256)
    return torch.stack([values_16[byte_256 & 0xF], values_16[byte_256 >> 4]], dim=1).view(torch.int32).flatten()


def fp4_values(packed_PB: torch.Tensor) -> torch.Tensor:
    """uint8 [P, Q / 2], the low four bits first, to their values as float32 [P, Q]."""
    pairs = _fp4_pairs().index_select(0, packed_PB.reshape(-1).to(torch.int32))
    return pairs.view(torch.bfloat16).view(len(packed_PB), -1).to(torch.float32)


def dequantize_mxfp4(blocks_PqB: torch.Tensor, scales_Pq: torch.Tensor) -> torch.Tensor:
    """MXFP4 (gpt-oss): uint8 [P, Q / 32, 16] and uint8 exponents [P, Q / 32] to bfloat16 [P, Q].

    A value is `fp4 * 2 ** (scale - 127)`, which is exact in bfloat16.
    """
    P, q, num_bytes = blocks_PqB.shape
    pairs = _fp4_pairs().index_select(0, blocks_PqB.reshape(-1).to(torch.int32))
    factor_Pq1 = torch.exp2(scales_Pq.to(torch.float32) - E8M0_BIAS).to(torch.bfloat16).unsqueeze(-1)
    return pairs.view(torch.bfloat16).view(P, q, 2 * num_bytes).mul_(factor_Pq1).view(P, 2 * q * num_bytes)


def dequantize_int4(packed_PB: torch.Tensor, scale_Pg: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Symmetric INT4 (compressed-tensors' pack-quantized): uint8 [P, Q / 2] and float scales [P, groups] to [P, Q].

    A value is `(four bits - 8) * scale`, multiplied in float32 and rounded to `dtype`.
    """
    P, half = packed_PB.shape
    values_PQ = torch.stack([packed_PB & 0xF, packed_PB >> 4], dim=2).view(P, 2 * half).to(torch.float32) - INT4_ZERO
    scale_PQ = scale_Pg.to(torch.float32).repeat_interleave(2 * half // scale_Pg.shape[1], dim=1)
    return values_PQ.mul_(scale_PQ).to(dtype)
