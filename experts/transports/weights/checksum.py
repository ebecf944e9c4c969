"""A checksum of packed experts that is cheaper than the memory it reads.

Two sums, wrapping: of all 64-bit words, and of all 32-bit words times odd numbers (1, 3, 5, ...). The first notices
every change of one word, the second words that change places. It guards against mistakes, not against an attacker.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from placement.compiled import compiled


@intrinsic
def _words_at(typingctx: Any, address: Any) -> Any:
    """An address (int64) as a pointer to uint64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint64)(types.int64), codegen


@intrinsic
def _bytes_at(typingctx: Any, address: Any) -> Any:
    """An address (int64) as a pointer to uint8."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint8)(types.int64), codegen


def new_sums() -> np.ndarray:
    """Sums of nothing, for `add_to_sums`: uint64 [3], the two sums and the 64-bit words so far."""
    return np.zeros(3, np.uint64)


@compiled()
def add_to_sums(address: int, nbytes: int, sums: np.ndarray) -> None:
    """Add `nbytes` at `address` to `sums`. If they are no multiple of 8, the last word is filled up with zeros."""
    low = types.uint64(0xFFFFFFFF)
    plain, weighted, weight = sums[0], sums[1], sums[2] * types.uint64(4) + types.uint64(1)
    words = carray(_words_at(address), nbytes // 8)
    for k in range(len(words)):
        word = words[k]
        plain += word
        weighted += (word & low) * (weight & low)
        weighted += (word >> types.uint64(32)) * ((weight + types.uint64(2)) & low)
        weight += types.uint64(4)
    rest = nbytes % 8
    if rest:
        tail = carray(_bytes_at(address + nbytes - rest), rest)
        word = types.uint64(0)
        for k in range(rest):
            word |= types.uint64(tail[k]) << types.uint64(8 * k)
        plain += word
        weighted += (word & low) * (weight & low)
        weighted += (word >> types.uint64(32)) * ((weight + types.uint64(2)) & low)
        weight += types.uint64(4)
    sums[0], sums[1], sums[2] = plain, weighted, weight // types.uint64(4)
