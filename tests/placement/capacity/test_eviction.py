"""The rule by which experts leave a shard's memory, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from placement.capacity.eviction import coldest, in_parts, most_at_once, note_use, worth_of_layers


def test_heat_is_the_share_of_late_calls_that_used_a_slot() -> None:
    """A call takes a tenth of all heat and adds a tenth to what it uses; its further parts only add."""
    heat_S = np.array([0.5, 0.5, 0.0], np.float32)
    note_use(heat_S, np.array([0]), first_part=True)
    np.testing.assert_allclose(heat_S, [0.55, 0.45, 0.0], rtol=1e-6)
    note_use(heat_S, np.array([2]), first_part=False)
    np.testing.assert_allclose(heat_S, [0.55, 0.45, 0.1], rtol=1e-6)


def test_a_layer_that_is_called_later_is_worth_less() -> None:
    np.testing.assert_allclose(worth_of_layers(3), [[0.65, 1, 0.825], [0.825, 0.65, 1], [1, 0.825, 0.65]], rtol=1e-6)
    np.testing.assert_allclose(worth_of_layers(2), [[0.65, 1], [1, 0.65]], rtol=1e-6)
    assert worth_of_layers(1).tolist() == [[1]]
    assert worth_of_layers(2).dtype == np.float32


@pytest.mark.parametrize(("count", "expected"), [(1, {3}), (2, {1, 3}), (3, {1, 2, 3}), (4, {1, 2, 3})])
def test_the_coldest_leave(count: int, expected: set[int]) -> None:
    """Slots 0 and 1 of layer 0, 2 and 3 of layer 1, which is worth half; 0 may not leave."""
    heat_LS = np.array([[0.1, 0.2], [0.5, 0.3]], np.float32)
    leaving_LS = np.array([[False, True], [True, True]])
    found = coldest(heat_LS, np.array([1, 0.5], np.float32), leaving_LS, count)
    assert set(found.tolist()) == expected
    assert len(found) == len(expected)


def test_a_call_may_have_half_of_what_layers_share_or_all_of_its_own() -> None:
    assert [most_at_once(4, layers, shared=True) for layers in (1, 2, 3, 5)] == [4, 4, 6, 10]
    assert most_at_once(4, 5, shared=False) == 4


def test_parts_of_a_call_begin_with_what_is_in_memory() -> None:
    here_S = np.array([False, True, False, False, True, True])
    slots_U = np.array([0, 1, 2, 4, 5])
    assert [part.tolist() for part in in_parts(slots_U, here_S, 2)] == [[1, 4], [5, 0], [2]]
    assert [part.tolist() for part in in_parts(slots_U, None, 2)] == [[0, 1], [2, 4], [5]]
    assert [part.tolist() for part in in_parts(slots_U, here_S, 5)] == [[0, 1, 2, 4, 5]], "one part keeps its order"
