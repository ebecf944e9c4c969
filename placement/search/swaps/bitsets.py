"""Sets of tokens as bits.

T tokens, K experts of one, E experts, R ranks, I items, W words of 64 tokens. "How many tokens with expert a want no
other expert of this rank" is then a handful of and, not and popcount over W words.
"""

from __future__ import annotations

import numpy as np

from placement.compiled import compiled


@compiled()
def token_bits(topk_ids_TK: np.ndarray, num_experts: int) -> np.ndarray:
    """uint64 [E, W]: bit t of row e says that token t wants expert e; ids that are no expert are left out."""
    num_tokens, top_k = topk_ids_TK.shape
    bits_EW = np.zeros((num_experts, (num_tokens + 63) // 64), np.uint64)
    for t in range(num_tokens):
        bit = np.uint64(1) << np.uint64(t & 63)
        for k in range(top_k):
            expert = topk_ids_TK[t, k]
            if 0 <= expert < num_experts:
                bits_EW[expert, t >> 6] |= bit
    return bits_EW


@compiled()
def assigned_token_bits(
    topk_ids_TK: np.ndarray, rank_TK: np.ndarray, item_ER: np.ndarray, num_items: int
) -> np.ndarray:
    """uint64 [items, W]: the tokens that each physical expert serves; `item_ER` its index by expert and rank."""
    num_tokens, top_k = topk_ids_TK.shape
    bits_IW = np.zeros((num_items, (num_tokens + 63) // 64), np.uint64)
    for t in range(num_tokens):
        bit = np.uint64(1) << np.uint64(t & 63)
        for k in range(top_k):
            if rank_TK[t, k] >= 0:
                bits_IW[item_ER[topk_ids_TK[t, k], rank_TK[t, k]], t >> 6] |= bit
    return bits_IW
