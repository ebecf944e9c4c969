"""Fresh targets named for few copies: the same plan, the fewest copies, no rank that is not like another."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.placement import Placement
from placement.search.few_copies.relabel import relabel
from placement.search.few_copies.resize import copies_between


def rows_of(placement: Placement, layer: int) -> list[list[int]]:
    return placement.physical_to_logical_map[layer].reshape(placement.num_ranks, -1).tolist()


@settings(max_examples=60)
@given(seed=st.integers(0, 2**31), before=st.integers(1, 5))
def test_no_naming_of_like_ranks_needs_fewer_copies(seed, before):
    rng = np.random.default_rng(seed)
    held = Placement(before, 1, 6, rng.integers(-1, 6, (2, before * 3)), partial=True)
    slots = np.array([rng.permutation([*range(6), 0, 3, -1, -1, -1, -1]) for _ in range(2)])
    nodes, kinds = (0, 0, 1, 0), (3, 3, 3, 3)
    target = Placement(4, 2, 6, slots, nodes=nodes)
    used = [rank for rank in (0, 1, 3) if any(max(rows_of(target, layer)[rank]) >= 0 for layer in range(2))]
    result = relabel(held, target, kinds)
    fewest = 0
    for layer in range(2):
        rows = rows_of(target, layer)
        assert sorted(rows[rank] for rank in used) == sorted(rows_of(result, layer)[rank] for rank in used)
        assert rows_of(result, layer)[2] == rows[2]
        mine = [*map(set, rows_of(held, layer)), *[set()] * 4]
        fewest += len(set(rows[2]) - mine[2] - {-1}) + min(
            sum(len(set(rows[row]) - mine[rank] - {-1}) for rank, row in zip(used, order, strict=True))
            for order in itertools.permutations(used)
        )
    assert copies_between(held, result) == fewest


def test_unused_ranks_and_ranks_of_another_kind_are_left_alone():
    held = Placement(3, 1, 2, np.array([[0, -1, 1, -1, -1, -1]]))
    target = Placement(3, 1, 2, np.array([[-1, -1, 0, -1, 1, -1]]))
    assert relabel(held, target).physical_to_logical_map.tolist() == [[-1, -1, 1, -1, 0, -1]]
    assert relabel(held, target, kinds_R=[1, 2, 1]) == target
    assert relabel(target, target) == target


def test_what_does_not_fit_is_refused():
    held = Placement.linear(1, 2, 2)
    with pytest.raises(ValueError, match="kinds_R names 1 ranks, the target has 2"):
        relabel(held, held, [1])
    with pytest.raises(ValueError, match="what is held is for 1 layers of 2 experts, the target for 2 of 2"):
        relabel(held, Placement.linear(2, 2, 2))
