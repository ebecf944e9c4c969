"""Synthetic routing of a large model: lognormal loads, and groups of experts that tokens of one topic prefer.

T tokens, L layers, E experts, P topics, K experts per token.
"""

from __future__ import annotations

import numpy as np

from placement.traces.trace import ActivationTrace


def synthetic_trace(
    num_tokens: int,
    num_layers: int = 58,
    num_experts: int = 256,
    top_k: int = 8,
    sigma: float = 0.5,
    topics: int = 32,
    affinity: float = 2.0,
    seed: int = 0,
    token_seed: int = 0,
) -> ActivationTrace:
    """Top-k of log loads with Gumbel noise, plus `affinity` for the experts of the token's topic.

    `seed` determines the model (loads, topics), `token_seed` the tokens drawn from it.
    """
    model = np.random.default_rng((seed, num_layers, num_experts))
    logit_LE = model.normal(0, sigma, (num_layers, num_experts))
    likes_LPE = affinity * (model.random((num_layers, topics, num_experts)) < 1.5 / np.sqrt(topics))
    rng = np.random.default_rng((seed, token_seed, 1))
    topic_T = rng.integers(topics, size=num_tokens)
    ids = np.empty((num_tokens, num_layers, top_k), np.int16)
    for layer in range(num_layers):
        noise_TE = rng.gumbel(size=(num_tokens, num_experts)).astype(np.float32)
        score_TE = noise_TE + (logit_LE[layer] + likes_LPE[layer])[topic_T].astype(np.float32)
        ids[:, layer] = np.argpartition(-score_TE, top_k, axis=1)[:, :top_k]
    return ActivationTrace(ids, num_experts)
