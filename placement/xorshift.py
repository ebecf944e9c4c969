"""Random numbers for compiled code: xorshift64*, one word of state (https://doi.org/10.18637/jss.v008.i14)."""

from __future__ import annotations

import numpy as np

from placement.compiled import compiled


@compiled()
def next_random(random_1: np.ndarray) -> np.uint64:
    """The next 64 random bits of xorshift64* (Vigna 2016); `random_1` uint64 [1], not 0, is advanced."""
    x = random_1[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    random_1[0] = x
    return x * np.uint64(2685821657736338717)


@compiled()
def random_below(random_1: np.ndarray, bound: int) -> int:
    """A random integer from 0 to bound - 1."""
    # int() would stay unsigned when compiled
    return np.int64(((next_random(random_1) >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32))  # type: ignore[return-value]


@compiled()
def random_unit(random_1: np.ndarray) -> float:
    """A random number from above 0 up to 1, safe to take the logarithm of."""
    return (np.float64(next_random(random_1) >> np.uint64(11)) + 1.0) * (1.0 / 9007199254740992.0)


def random_state(*seeds: int) -> np.ndarray:
    """uint64 [1]: a state for `next_random`, determined by the seeds."""
    return np.maximum(np.random.SeedSequence(seeds).generate_state(1, np.uint64), np.uint64(1))
