"""A router adds up what shards send in float32, to the last bit: over every kind of link.

Legend: T tokens, K top-k, E logical experts, D hidden size.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from experts.dispatch.dispatcher import Dispatcher
from experts.dispatch.layer_shape import LayerShape
from experts.protocol.membership import Membership
from placement.placement import Placement
from tests.support.fake_links import FakeLink, lost

LAYERS, EXPERTS, TOP_K, D = 2, 6, 3, 24
# From here on, the next number of each dtype is 2 further on: adding 1 and again 1 changes nothing in that dtype.
TWO_APART = {torch.bfloat16: 2.0**8, torch.float16: 2.0**11}
ONE_SHARD_EACH = (0, 2, 4)  # experts on different ranks


class Constants:
    """Experts that give back a number each, whatever comes in; a layer's are the other layer's negated."""

    def __init__(self, values_E: list[float]) -> None:
        self.values_E = torch.tensor(values_E)

    def forward(
        self, layer: int, x_TD: torch.Tensor, topk_weights_TK: torch.Tensor, topk_ids_TK: torch.Tensor
    ) -> torch.Tensor:
        wanted_TK = topk_ids_TK >= 0
        parts_TK = topk_weights_TK * self.values_E[topk_ids_TK.clamp(min=0).long()] * wanted_TK
        return ((-1) ** layer * parts_TK.sum(1, keepdim=True)).expand(-1, D).to(x_TD.dtype)


def dispatcher(values_E: list[float], dtype: torch.dtype, apart: bool) -> tuple[Dispatcher, dict[int, FakeLink]]:
    """Three shards of two experts each."""
    shape, placement = LayerShape(LAYERS, EXPERTS, TOP_K, D, dtype), Placement.linear(LAYERS, EXPERTS, 3)
    experts = Constants(values_E)
    links = {rank: FakeLink(rank, placement, shape, 8, experts, apart) for rank in range(3)}  # type: ignore[arg-type]
    found = Dispatcher(shape, 8, 1.0, experts)  # type: ignore[arg-type]
    found.apply(Membership(1, placement, (None,) * 3), dict(links), {})
    return found, links


def forward(found: Dispatcher, dtype: torch.dtype, experts: tuple[int, ...], layer: int = 0) -> torch.Tensor:
    """Two tokens that want these experts, at weight 1."""
    ids_TK = torch.tensor([experts, experts], dtype=torch.int32)
    return found.forward(layer, torch.ones(2, D, dtype=dtype), torch.ones(2, TOP_K), ids_TK)


@pytest.mark.parametrize("order", list(itertools.permutations(ONE_SHARD_EACH)))
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_are_added_up_in_float32(dtype: torch.dtype, apart: bool, order: tuple[int, ...]) -> None:
    for large in ONE_SHARD_EACH:
        values_E = [1.0] * EXPERTS
        values_E[large] = TWO_APART[dtype]
        y_TD = forward(dispatcher(values_E, dtype, apart)[0], dtype, order)
        assert y_TD.dtype == dtype
        assert y_TD.tolist() == [[TWO_APART[dtype] + 2] * D] * 2


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float16, False), (torch.float16, True), (torch.bfloat16, True)])
def test_what_is_computed_here_is_added_to_the_sum_before_it_is_rounded(dtype: torch.dtype, apart: bool) -> None:
    """The shard of the last expert is lost, and its 1 comes from the router's own checkpoint."""
    values_E = [TWO_APART[dtype], 0.0, 1.0, 0.0, 1.0, 0.0]
    found, links = dispatcher(values_E, dtype, apart)
    links[2].wait_faults = [lost]
    assert forward(found, dtype, ONE_SHARD_EACH).tolist() == [[TWO_APART[dtype] + 2] * D] * 2
    assert found.stats.fallback_pairs == 2


@pytest.mark.parametrize("apart", [False, True])
def test_a_layer_is_computed_by_its_own_experts(apart: bool) -> None:
    found, _ = dispatcher([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], torch.float32, apart)
    assert forward(found, torch.float32, (1, 2, 5), layer=0).tolist() == [[11.0] * D] * 2
    assert forward(found, torch.float32, (1, 2, 5), layer=1).tolist() == [[-11.0] * D] * 2
