"""Tiles of the Triton kernels: every pair is in exactly one tile, of its own slot. Needs no triton."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.kernels.triton.tiles import choose_block, cut_tiles


def test_worked_example():
    order, tiles = cut_tiles(np.array([0, 2, 0], dtype=np.int32), num_slots=4, block=2)
    assert order.tolist() == [0, 2, 1]
    assert tiles.tolist() == [[0, 0, 2], [2, 2, 3]]


@settings(deadline=None)
@given(slots=st.lists(st.integers(0, 5), max_size=60), block=st.sampled_from([1, 2, 3, 16]))
def test_tiles_cover_every_pair_once(slots, block):
    slots_N = np.array(slots, dtype=np.int32)
    order, tiles = cut_tiles(slots_N, num_slots=6, block=block)
    assert sorted(order.tolist()) == list(range(len(slots)))
    covered = []
    for slot, first, end in tiles.tolist():
        pairs = range(first, min(first + block, end))
        assert len(pairs) > 0
        assert all(slots[order[p]] == slot for p in pairs)
        covered += pairs
    assert covered == list(range(len(slots)))


def test_blocks_grow_with_the_pairs_of_a_slot():
    assert [choose_block(pairs, 32) for pairs in (1, 512, 513, 2000, 2048, 100_000)] == [16, 16, 32, 64, 64, 128]
