"""One layer's steps for dispatch of fixed capacity: shape, placements, routing, and what must come out.

Imports neither pydantic nor anything of a mesh, so that its tests run on a bare GPU machine. Legend: L layers,
E experts, R ranks, T tokens, K top-k, D hidden size.
"""

from __future__ import annotations

import numpy as np
import torch

from experts.dispatch.layer_shape import LayerShape

SHAPE = LayerShape(num_layers=2, num_experts=12, top_k=4, hidden_size=40, dtype=torch.float32)


def placement(num_ranks: int, replicas: bool, seed: int) -> np.ndarray:
    """slots [L, E, R]; every expert is on some rank."""
    rng = np.random.default_rng(seed)
    slots_LER = np.full((SHAPE.num_layers, SHAPE.num_experts, num_ranks), -1, np.int32)
    for layer in range(SHAPE.num_layers):
        for expert in range(SHAPE.num_experts):
            count = min(num_ranks, int(rng.integers(1, 3))) if replicas else 1
            slots_LER[layer, expert, rng.permutation(num_ranks)[:count]] = expert
    return slots_LER


def routing(num_tokens: int, seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weights, ids; one pair in ten is padding."""
    generator = torch.Generator().manual_seed(seed)
    K, E = SHAPE.top_k, SHAPE.num_experts
    ids_TK = torch.rand(num_tokens, E, generator=generator).argsort(1)[:, :K].int()
    ids_TK[torch.rand(num_tokens, K, generator=generator) < 0.1] = -1
    x_TD = torch.randn(num_tokens, SHAPE.hidden_size, generator=generator).to(dtype)
    return x_TD, torch.rand(num_tokens, K, generator=generator), ids_TK


def definition(x_TD: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """What the layer gives if expert e multiplies its input by e + 1, in float64."""
    scale_TK = torch.where(ids_TK >= 0, weights_TK.double() * (ids_TK + 1), 0.0)
    return x_TD.double() * scale_TK.sum(1, keepdim=True)
