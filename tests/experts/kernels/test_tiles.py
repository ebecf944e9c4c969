"""Tiles of the Triton kernels: every pair is in exactly one tile, of its own slot. Needs no triton."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.kernels.base import KernelShape
from experts.kernels.triton import tiles as tiles_module
from experts.kernels.triton.tiles import choose_block, cut_tiles, tile_pairs
from experts.model.spec import ActivationSpec
from experts.native.library import data_plane


def test_worked_example():
    order, tiles = cut_tiles(np.array([0, 2, 0], dtype=np.int32), num_slots=4, block=2)
    assert order.tolist() == [0, 2, 1]
    assert tiles.tolist() == [[0, 0, 2], [2, 2, 3]]


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
    assert [choose_block(pairs, 32) for pairs in (1, 512, 513, 2000, 6144, 6145)] == [16, 16, 32, 64, 64, 128]


@pytest.mark.skipif(data_plane() is None, reason="no C++ compiler")
@given(
    rows=st.lists(st.lists(st.tuples(st.integers(0, 39), st.floats(0, 1, width=32)), max_size=5), max_size=60),
    num_slots=st.sampled_from([40, 64]),
)
def test_compiled_code_fills_the_same_parts(rows, num_slots):
    """Rows without a pair, slots without one, and tiles of 16 pairs that are full to the last or not."""
    offsets_M1 = torch.tensor([0, *np.cumsum([len(row) for row in rows]).tolist()], dtype=torch.int32)
    slots_N = torch.tensor([slot for row in rows for slot, _ in row], dtype=torch.int32)
    weights_N = torch.tensor([weight for row in rows for _, weight in row], dtype=torch.float32)
    shape = KernelShape(
        1, num_slots=num_slots, hidden_size=8, intermediate_size=8, activation=ActivationSpec("silu"),
        has_bias=False, dtype=torch.float32, device="cpu",
    )  # fmt: skip
    compiled = tile_pairs(offsets_M1, slots_N, weights_N, shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles_module, "data_plane", lambda: None)
        plain = tile_pairs(offsets_M1, slots_N, weights_N, shape)
    assert (compiled.block, compiled.num_tiles) == (plain.block, plain.num_tiles)
    used = 3 * plain.num_tiles
    assert compiled.tiles[:used].tolist() == plain.tiles[:used].tolist()
    for name in ("row_P", "pair_P", "offsets_M1", "weight_P"):
        assert getattr(compiled, name).tolist() == getattr(plain, name).tolist()
