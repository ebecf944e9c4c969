"""Turns stored blocks and scales back into plain floats.

Legend: P rows, Q columns of one expert's matrix, p and q the same counted in blocks.
"""

from __future__ import annotations

import functools

import torch

MXFP4_BLOCK = 32  # values that share a scale, 16 bytes
# The sixteen values of FP4 E2M1 (OCP Microscaling Formats 1.0, table 4): sign, 2 exponent bits, 1 mantissa bit.
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E8M0_BIAS = 127


def dequantize_fp8_block(weight_PQ: torch.Tensor, scale_inv_pq: torch.Tensor, block: int) -> torch.Tensor:
    """FP8 weights with one scale a `block` x `block` square (DeepSeek-V3): `weight * scale`, float32 [P, Q].

    The last block of a row or column may be partial. Expects `scale_inv_pq` [ceil(P / block), ceil(Q / block)].
    """
    Q = weight_PQ.shape[1]
    out_PQ = weight_PQ.to(torch.float32)
    scale_pQ = scale_inv_pq.to(torch.float32).repeat_interleave(block, dim=1)[:, :Q]
    for p, scale_Q in enumerate(scale_pQ):  # a block row at a time, so that no full-size scale matrix is made
        out_PQ[p * block : (p + 1) * block].mul_(scale_Q)
    return out_PQ


@functools.cache
def _fp4_pairs() -> torch.Tensor:
    """[256, 2]: the two values of a byte, the low nibble first."""
    values_16 = torch.tensor(FP4_VALUES)
    byte_256 = torch.arange(256)
    return torch.stack([values_16[byte_256 & 0xF], values_16[byte_256 >> 4]], dim=1)


def dequantize_mxfp4(blocks_PqB: torch.Tensor, scales_Pq: torch.Tensor) -> torch.Tensor:
    """MXFP4 (gpt-oss): uint8 [P, Q / 32, 16] and uint8 exponents [P, Q / 32] to float32 [P, Q].

    A value is `fp4 * 2 ** (scale - 127)`.
    """
    P, q, _ = blocks_PqB.shape
    values = _fp4_pairs().index_select(0, blocks_PqB.reshape(-1).to(torch.int32)).view(P, q, MXFP4_BLOCK)
    exponent_Pq1 = scales_Pq.to(torch.int32).sub_(E8M0_BIAS).unsqueeze(-1)
    return torch.ldexp(values, exponent_Pq1).view(P, q * MXFP4_BLOCK)
