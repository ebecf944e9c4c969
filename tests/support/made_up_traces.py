"""Small made-up traces: tokens prefer cliques of experts, so that a good placement is known by construction."""

from __future__ import annotations

import numpy as np

from placement.traces.trace import ActivationTrace


def clique_trace(
    num_tokens: int = 400,
    num_experts: int = 16,
    top_k: int = 4,
    num_layers: int = 2,
    purity: float = 0.9,
    seed: int = 0,
) -> ActivationTrace:
    """Cliques of `top_k` experts with shuffled ids; a token takes each expert of its clique with chance `purity`."""
    rng = np.random.default_rng(seed)
    ids = np.empty((num_tokens, num_layers, top_k), np.int16)
    for layer in range(num_layers):
        order = rng.permutation(num_experts)
        clique_T = rng.integers(num_experts // top_k, size=num_tokens)
        for t in range(num_tokens):
            pick = order[clique_T[t] * top_k : (clique_T[t] + 1) * top_k].copy()
            others = np.setdiff1d(np.arange(num_experts), pick)
            swap = rng.random(top_k) > purity
            pick[swap] = rng.choice(others, int(swap.sum()), replace=False)
            ids[t, layer] = pick
    return ActivationTrace(ids, num_experts)
