"""The optima that published balancers are compared with: against trying all ways."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from benchmarks.placement.published import least_largest


@pytest.mark.parametrize("seed", range(20))
def test_whole_experts_take_the_next_integer(seed: int) -> None:
    rng = np.random.default_rng(seed)
    holds_ER = rng.random((6, 3)) < 0.5
    holds_ER[np.arange(6), rng.integers(3, size=6)] = True
    wanted_E = (rng.random(6) < 0.8).astype(float)
    wanted_E[0] = 1
    ways = itertools.product(*(np.flatnonzero(holds_ER[expert]) for expert in np.flatnonzero(wanted_E)))
    best = min(np.bincount(way, minlength=3).max() for way in ways)
    assert math.ceil(least_largest(wanted_E, holds_ER) - 1e-6) == best


def test_split_work_is_even_as_far_as_replicas_allow() -> None:
    everywhere, alone = [True, True, True], [True, False, False]
    assert least_largest(np.array([9.0]), np.array([everywhere])) == pytest.approx(3)
    assert least_largest(np.array([6.0, 9.0]), np.array([alone, everywhere])) == pytest.approx(6)
    assert least_largest(np.array([0.0, 9.0]), np.array([everywhere, alone])) == pytest.approx(9)
