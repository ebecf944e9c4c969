"""The experts that a reader must return from a synthetic checkpoint, and the plainest way to store them.

Legend: E experts, D hidden size, I expert intermediate size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

E, D, I = 3, 8, 6


@dataclass
class Expected:
    """gate [I, D], up [I, D], down [D, I] and biases of every (layer id, expert)."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    experts: dict[tuple[int, int], tuple[torch.Tensor, ...]] = field(default_factory=dict)
    biases: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def draw(self, layers: Sequence[int], seed: int = 0, bias: bool = False) -> Expected:
        """Random experts for decoder layers."""
        generator = torch.Generator().manual_seed(seed)
        for layer in layers:
            for expert in range(E):
                shapes = ((I, D), (I, D), (D, I))
                self.experts[layer, expert] = tuple(torch.randn(s, generator=generator) for s in shapes)
                if bias:
                    self.biases[layer, expert] = tuple(torch.randn(n, generator=generator) for n in (2 * I, D))
        return self

    def layer(self, layer: int) -> list[tuple[torch.Tensor, ...]]:
        """gate, up, down of all experts of a layer."""
        return [self.experts[layer, expert] for expert in range(E)]


def one_tensor_per_matrix(config: dict[str, Any], layers: Sequence[int], stem: str, names: Sequence[str]) -> Expected:
    """`stem` contains {l} and {e}; `names` are the names of gate, up and down."""
    out = Expected(config).draw(layers)
    for (layer, expert), weights in out.experts.items():
        for name, weight in zip(names, weights, strict=True):
            out.tensors[stem.format(l=layer, e=expert) + name] = weight
    return out


PROJ = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
W132 = ("w1.weight", "w3.weight", "w2.weight")
