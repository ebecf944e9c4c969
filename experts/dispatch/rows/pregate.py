"""Which experts the next layer will probably need: its gate applied to what this layer's experts get.

Both are close in a residual stream. Shards that offload fetch these experts while the next layer's attention runs
(docs/offload.md); other shards never ask, and then nothing here runs.

Legend: T tokens, K top-k, E experts, D hidden size.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch

from experts.protocol.wire import HINTED_EXPERTS, hint_words

logger = logging.getLogger(__name__)

MAX_TOKENS = 64  # of a step; more of them need most experts anyway
_NOTHING = hint_words(np.empty(0, np.int64))


@dataclass(frozen=True)
class Gate:
    """One layer's gate, as vLLM's model calls it. DeepSeek's choose by sigmoid(logits) + correction_E."""

    module: torch.nn.Module
    correction_E: torch.Tensor | None = None

    def logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        """[T, E]."""
        found = self.module(x_TD)
        return found[0] if isinstance(found, tuple) else found

    def experts(self, x_TD: torch.Tensor, top_k: int) -> np.ndarray:
        """Ids of the `top_k` experts of each row, all rows together, on the host."""
        scores_TE = self.logits(x_TD)
        if self.correction_E is not None:
            scores_TE = scores_TE.float().sigmoid() + self.correction_E
        return scores_TE.topk(top_k, dim=-1).indices.flatten().cpu().numpy()


class PreGate:
    """The gates of an engine's MoE layers."""

    def __init__(self, gates: dict[int, Gate], top_k: int) -> None:
        """`gates` by MoE layer; of a layer without one nothing is said."""
        self._gates, self._top_k = gates, top_k

    @classmethod
    def of(
        cls, model: torch.nn.Module, layers: dict[str, int], num_experts: int, top_k: int, x_TD: torch.Tensor
    ) -> PreGate:
        """Find the gates of a loaded model: beside the experts, whose modules' names `layers` maps to MoE layers.

        `x_TD` are rows to try them with.
        """
        gates: dict[int, Gate] = {}
        modules = dict(model.named_modules())
        for name, layer in layers.items() if num_experts <= HINTED_EXPERTS else ():
            found = _gate_beside(modules, name, num_experts, x_TD)
            if found is not None:
                gates[layer] = found
        if len(gates) < len(layers):
            logger.info("of %d of %d MoE layers the gate is not known here", len(layers) - len(gates), len(layers))
        return cls(gates, top_k)

    def words(self, layer: int, x_TD: torch.Tensor) -> np.ndarray:
        """What a request of MoE layer `layer` says of the next one: words H_HINTS and later, zero for nothing."""
        gate = self._gates.get(layer + 1)
        if gate is None or not 0 < len(x_TD) <= MAX_TOKENS:
            return _NOTHING
        return hint_words(gate.experts(x_TD, self._top_k))


def _gate_beside(modules: dict[str, torch.nn.Module], name: str, num_experts: int, x_TD: torch.Tensor) -> Gate | None:
    """The gate in the innermost module around experts that has one."""
    while "." in name:
        name = name.rpartition(".")[0]
        for attribute in ("gate", "router"):
            module = getattr(modules[name], attribute, None)
            if not isinstance(module, torch.nn.Module):
                continue
            gate = Gate(module, getattr(module, "e_score_correction_bias", None))
            try:
                with torch.inference_mode():
                    if gate.logits(x_TD).shape == (len(x_TD), num_experts):
                        return gate
            except Exception as error:  # a module of another kind: hints are no more than a help
                logger.info("%s.%s is no gate that can be asked: %s", name, attribute, error)
    return None
