"""A router adds up what shards send in float32, to the last bit: over every kind of link.

Legend: T tokens, E logical experts, D hidden size.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.support.constant_experts import EXPERTS, D, dispatcher, forward
from tests.support.fake_links import lost

# From here on, the next number of each dtype is 2 further on: adding 1 and again 1 changes nothing in that dtype.
TWO_APART = {torch.bfloat16: 2.0**8, torch.float16: 2.0**11}
ONE_SHARD_EACH = (0, 2, 4)  # experts on different ranks


@pytest.mark.parametrize("order", list(itertools.permutations(ONE_SHARD_EACH)))
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_are_added_up_in_float32(dtype: torch.dtype, apart: bool, order: tuple[int, ...]) -> None:
    for large in ONE_SHARD_EACH:
        values_E = [1.0] * EXPERTS
        values_E[large] = TWO_APART[dtype]
        y_TD = forward(dispatcher(values_E, dtype, apart)[0], [order] * 2)
        assert y_TD.dtype == dtype
        assert y_TD.tolist() == [[TWO_APART[dtype] + 2] * D] * 2


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float16, False), (torch.float16, True), (torch.bfloat16, True)])
def test_what_is_computed_here_is_added_to_the_sum_before_it_is_rounded(dtype: torch.dtype, apart: bool) -> None:
    """The shard of the last expert is lost, and its 1 comes from the router's own checkpoint."""
    values_E = [TWO_APART[dtype], 0.0, 1.0, 0.0, 1.0, 0.0]
    found, links = dispatcher(values_E, dtype, apart)
    links[2].wait_faults = [lost]
    assert forward(found, [ONE_SHARD_EACH] * 2).tolist() == [[TWO_APART[dtype] + 2] * D] * 2
    assert found.stats.fallback_pairs == 2


@pytest.mark.parametrize("apart", [False, True])
def test_a_layer_is_computed_by_its_own_experts(apart: bool) -> None:
    found, _ = dispatcher([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], torch.float32, apart)
    assert forward(found, [(1, 2, 5)] * 2, layer=0).tolist() == [[11.0] * D] * 2
    assert forward(found, [(1, 2, 5)] * 2, layer=1).tolist() == [[-11.0] * D] * 2
