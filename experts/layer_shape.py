"""What every MoE layer of the served model has in common on the router's side."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LayerShape:
    """What every MoE layer of the served model has in common on the router's side."""

    num_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one activation row on the wire."""
        return self.hidden_size * self.dtype.itemsize
