"""Samples the router's own decisions: per-token top-k sets over all layers, for the placement optimizer.

Legend: T tokens, K top-k, L MoE layers.

A step's ids are copied layer by layer into one buffer and offered to a reservoir at the last layer, so that recording
costs one small copy a layer. Only tokens that were really dispatched are counted: warm-up never reaches this.
"""

from __future__ import annotations

import numpy as np
import torch

from experts.layer_shape import LayerShape
from placement.recorder import TraceRecorder


class StepRecorder:
    """Collects one step's decisions and hands whole tokens to a `TraceRecorder`."""

    def __init__(self, shape: LayerShape, capacity: int, max_rows: int) -> None:
        self._shape = shape
        self._max_rows = max_rows
        self._step_TLK = np.full((max_rows, shape.num_layers, shape.top_k), -1, np.int16)
        self._recorder = TraceRecorder(shape.num_layers, shape.num_experts, shape.top_k, capacity) if capacity else None

    def add(self, layer: int, topk_ids_TK: torch.Tensor) -> None:
        """Note the decisions of one layer; the last layer of a step completes its tokens."""
        if self._recorder is None:
            return
        num_tokens = min(len(topk_ids_TK), self._max_rows)
        self._step_TLK[:num_tokens, layer] = topk_ids_TK[:num_tokens].cpu().numpy()
        if layer == self._shape.num_layers - 1 and num_tokens:
            self._recorder.add(self._step_TLK[:num_tokens])

    def to_bytes(self) -> bytes:
        """The trace sampled so far as an .npz file's bytes. RuntimeError when recording is off."""
        if self._recorder is None:
            raise RuntimeError("trace_tokens is 0, so this router records no trace")
        return self._recorder.snapshot().to_bytes()
