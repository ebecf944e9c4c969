"""Sets of tokens as bits, and the random numbers of the compiled searches.

T tokens, K experts of one, E experts, W words of 64 tokens. A search that asks "how many tokens with expert a visit
no other expert of this rank" is then a handful of and, not and popcount over W words.
"""

from __future__ import annotations

import numpy as np

from placement.compiled import compiled
from placement.replica_choice import popcount


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


@compiled()
def count_bits(bits_W: np.ndarray) -> int:
    """Number of set bits in a row of words."""
    total = np.int64(0)
    for w in range(len(bits_W)):
        total += popcount(np.int64(bits_W[w]))
    return int(total)


@compiled()
def next_random(state_1: np.ndarray) -> np.uint64:
    """The next 64 random bits of xorshift64* (Vigna 2016); `state_1` uint64 [1], not 0, is advanced."""
    x = state_1[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    state_1[0] = x
    return x * np.uint64(2685821657736338717)


@compiled()
def random_below(state_1: np.ndarray, bound: int) -> int:
    """A random integer from 0 to bound - 1."""
    # int() would stay unsigned when compiled
    return np.int64(((next_random(state_1) >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32))  # type: ignore[return-value]


@compiled()
def random_unit(state_1: np.ndarray) -> float:
    """A random number from above 0 up to 1, safe to take the logarithm of."""
    return (np.float64(next_random(state_1) >> np.uint64(11)) + 1.0) * (1.0 / 9007199254740992.0)


def random_state(*seeds: int) -> np.ndarray:
    """uint64 [1]: a state for `next_random` that follows from the given seeds."""
    return np.maximum(np.random.SeedSequence(seeds).generate_state(1, np.uint64), np.uint64(1))
