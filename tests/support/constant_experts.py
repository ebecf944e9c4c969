"""Routers over links that compute in place, with experts that give back a number each: sums can be foretold to the bit.

Legend: T tokens, K top-k, E logical experts, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch

from experts.dispatch.dispatcher import Dispatcher
from experts.dispatch.layer_shape import LayerShape
from experts.protocol.membership import Membership
from placement.placement import Placement
from tests.support.fake_links import FakeLink

LAYERS, EXPERTS, TOP_K, D = 2, 6, 3, 24


class Constants:
    """Stands in for FallbackExperts. The numbers of layer 1 are those of layer 0 negated."""

    def __init__(self, values_E: list[float]) -> None:
        self.values_E = torch.tensor(values_E)
        self.calls: list[tuple[int, list[list[int]]]] = []  # (layer, ids) of each call

    def forward(
        self, layer: int, x_TD: torch.Tensor, topk_weights_TK: torch.Tensor, topk_ids_TK: torch.Tensor
    ) -> torch.Tensor:
        self.calls.append((layer, topk_ids_TK.tolist()))
        wanted_TK = topk_ids_TK >= 0
        parts_TK = topk_weights_TK * self.values_E[topk_ids_TK.clamp(min=0).long()] * wanted_TK
        return ((-1) ** layer * parts_TK.sum(1, keepdim=True)).expand(-1, D).to(x_TD.dtype)


class ConstantsHere(Constants):
    """Stands in for FallbackBudget, with time for everything."""

    def start_step(self) -> None:
        """Nothing is measured."""

    def forward(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        rows_TD = super().forward(*arguments)
        return rows_TD, torch.zeros(len(rows_TD), dtype=torch.bool)


def links_of(
    values_E: list[float], dtype: torch.dtype, apart: bool, placement: Placement, max_rows: int = 8
) -> dict[int, FakeLink]:
    """A link to each rank of a placement."""
    shape = LayerShape(LAYERS, EXPERTS, TOP_K, D, dtype)
    return {
        rank: FakeLink(rank, placement, shape, max_rows, Constants(values_E), apart)  # type: ignore[arg-type]
        for rank in range(placement.num_ranks)
    }


def dispatcher(
    values_E: list[float],
    dtype: torch.dtype = torch.float32,
    apart: bool = False,
    placement: Placement | None = None,
    max_rows: int = 8,
) -> tuple[Dispatcher, dict[int, FakeLink]]:
    """A router at epoch 1; three shards of two experts each, if no placement is given."""
    placement = placement or Placement.linear(LAYERS, EXPERTS, 3)
    links = links_of(values_E, dtype, apart, placement, max_rows)
    found = Dispatcher(LayerShape(LAYERS, EXPERTS, TOP_K, D, dtype), max_rows, 1.0, ConstantsHere(values_E))  # type: ignore[arg-type]
    found.apply(Membership(1, placement, (None,) * placement.num_ranks), dict(links), {})
    return found, links


def forward(found: Dispatcher, ids: list[tuple[int, ...]], layer: int = 0) -> torch.Tensor:
    """y [T, D] of tokens that want these experts, each at weight 1; -1 is none."""
    ids_TK = torch.tensor(ids, dtype=torch.int32).reshape(-1, TOP_K)
    x_TD = torch.ones(len(ids_TK), D, dtype=found.shape.dtype)
    return found.forward(layer, x_TD, torch.ones(ids_TK.shape), ids_TK)
