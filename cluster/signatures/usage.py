"""The experts that a prompt's rows took as a small vector, alike in all routers of a model: a signature.

R rows, L layers, E experts, K experts of a row. How often each of the L x E experts was taken is projected at random to
WIDTH numbers, which keeps distances: about 1 in sqrt(WIDTH) of them is noise.
"""

from __future__ import annotations

import functools

import numpy as np

WIDTH = 64
_LARGEST = 127.0


@functools.lru_cache(maxsize=2)
def _projection(num_layers: int, num_experts: int) -> np.ndarray:
    """float32 [L, E, WIDTH], each +1 or -1."""
    random = np.random.Generator(np.random.PCG64(20260701))
    signs = random.integers(0, 2, (num_layers, num_experts, WIDTH), dtype=np.int8)
    return (2 * signs - 1).astype(np.float32)


def signature(ids_RLK: np.ndarray, num_experts: int) -> np.ndarray:
    """int8 [WIDTH] of int [R, L, K], with -1 for none; all zeros if there are none.

    Length says nothing: it is scaled so that prompts of many and of few rows compare.
    """
    num_layers = ids_RLK.shape[1]
    share_LE = np.zeros((num_layers, num_experts + 1), np.float32)  # the last one: none
    np.add.at(share_LE, (np.arange(num_layers)[None, :, None], ids_RLK), 1.0)
    share_LE = share_LE[:, :-1]
    taken = share_LE.sum()
    if not taken:
        return np.zeros(WIDTH, np.int8)
    share_LE = np.sqrt(share_LE / taken)  # of length 1 over all layers
    made = np.einsum("le,lew->w", share_LE, _projection(num_layers, num_experts))
    return np.clip(np.rint(made * (_LARGEST / 4)), -_LARGEST, _LARGEST).astype(np.int8)
