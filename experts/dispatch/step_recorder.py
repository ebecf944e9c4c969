"""Samples the router's own decisions: each token's top-k sets over all layers, for the placement optimizer.

Legend: T tokens, K top-k, L MoE layers.

A step's ids are copied layer by layer into one buffer and offered to a reservoir at the last layer. Dispatch has them
in host memory anyway, so recording waits for no device. Rows that want no expert in any layer are padding and are left
out; the plug-in does not pass on steps of warm-up.
"""

from __future__ import annotations

import numpy as np

from experts.dispatch.layer_shape import LayerShape
from placement.traces.recorder import TraceRecorder


class StepRecorder:
    """Collects one step's decisions and passes whole tokens to a `TraceRecorder`; none if `capacity` is 0.

    `layers` are the model's own numbers of its MoE layers, for the trace; they default to 0, 1, 2 and so on.
    """

    def __init__(self, shape: LayerShape, capacity: int, layers: tuple[int, ...] = ()) -> None:
        self._shape = shape
        self._step_LTK = np.zeros((shape.num_layers, 0, shape.top_k), np.int16)
        self._num_tokens = 0
        self._next_layer = 0
        self._recorder = None
        if capacity:
            self._recorder = TraceRecorder(shape.num_layers, shape.num_experts, shape.top_k, capacity, layers=layers)

    def add(self, layer: int, topk_ids_TK: np.ndarray) -> None:
        """Record the decisions of one layer (any integers, -1 for none); a step's last layer completes its tokens.

        An interrupted step, whose layers do not follow one another, is left out.
        """
        if self._recorder is None:
            return
        num_tokens = len(topk_ids_TK)
        if layer == 0:
            self._num_tokens = num_tokens
            if num_tokens > self._step_LTK.shape[1]:
                self._step_LTK = np.empty((self._shape.num_layers, num_tokens, self._shape.top_k), np.int16)
        elif layer != self._next_layer or num_tokens != self._num_tokens:
            self._next_layer = -1
            return
        self._step_LTK[layer, :num_tokens] = topk_ids_TK
        self._next_layer = layer + 1
        if self._next_layer == self._shape.num_layers:
            self._next_layer = -1
            self._recorder.add(self._step_LTK[:, :num_tokens].transpose(1, 0, 2))

    def to_bytes(self) -> bytes:
        """The trace sampled so far as an .npz file's bytes, empty if nothing was recorded. RuntimeError when off."""
        recorder = self._on()
        return recorder.snapshot().to_bytes() if recorder.tokens_seen else b""

    def clear(self) -> None:
        """Drop what was recorded and start over. RuntimeError when recording is off."""
        self._on().clear()
        self._next_layer = -1

    def _on(self) -> TraceRecorder:
        if self._recorder is None:
            raise RuntimeError("trace_tokens is 0, so this router records no trace")
        return self._recorder
