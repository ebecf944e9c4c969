"""Any layer's experts in one process, from the checkpoint: what the distributed form is compared with.

Legend: T tokens, K top-k, M rows of one expert, D hidden size.

A router's fallback (`fallback_budget`) computes each expert with the same function.
"""

from __future__ import annotations

import logging
from collections import OrderedDict

import torch

from experts.checkpoint import ExpertCheckpoint
from experts.model.reference_mlp import expert_mlp
from experts.model.spec import ExpertSpec, ExpertWeights

logger = logging.getLogger(__name__)


class FallbackExperts:
    """Computes any expert of a memory-mapped checkpoint; keeps up to `cache_bytes` of converted weights."""

    def __init__(self, checkpoint: ExpertCheckpoint, dtype: torch.dtype, cache_bytes: int = 1 << 30) -> None:
        self.spec = checkpoint.spec
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._cache: OrderedDict[tuple[int, int], ExpertWeights] = OrderedDict()

    def weights(self, layer: int, expert: int) -> ExpertWeights:
        """The expert's weights in the working dtype, from the cache or the checkpoint."""
        key = (layer, expert)
        found = self._cache.get(key)
        if found is not None:
            self._cache.move_to_end(key)
            return found
        fresh = self._checkpoint.read_expert(layer, expert, self._dtype)
        self._cache[key] = fresh
        self._cached_bytes += fresh.nbytes
        while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= oldest.nbytes
        return fresh

    def forward(
        self, layer: int, x_TD: torch.Tensor, topk_weights_TK: torch.Tensor, topk_ids_TK: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of each token's experts, accumulated in fp32, in x's dtype and on x's device.

        `topk_ids_TK` holds logical experts, -1 where a pair is not wanted.
        """
        y_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
        for expert in topk_ids_TK.unique().tolist():
            if expert < 0:
                continue
            token, k = torch.where(topk_ids_TK == expert)
            weights = self.weights(layer, int(expert))
            y_TD.index_add_(0, token, weighted_expert(x_TD[token], topk_weights_TK[token, k], weights, self.spec))
        return y_TD.to(x_TD.dtype)


def weighted_expert(
    rows_MD: torch.Tensor, weight_M: torch.Tensor, weights: ExpertWeights, spec: ExpertSpec
) -> torch.Tensor:
    """One expert's rows times the router's weights of them: float32 [M, D]."""
    scale_M1 = weight_M.float()[:, None]
    if spec.weight_on_input:
        return expert_mlp((rows_MD.float() * scale_M1).to(rows_MD.dtype), weights, spec.activation).float()
    return expert_mlp(rows_MD, weights, spec.activation).float() * scale_M1
