"""What every MoE layer of the served model has in common on the router's side."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from placement.placement import Placement, check_same_model


@dataclass(frozen=True)
class LayerShape:
    """What every MoE layer of the served model has in common on the router's side."""

    num_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    dtype: torch.dtype
    num_draft_layers: int = 0  # of `num_layers`, the last ones: they guess tokens after a step, for the next one

    @property
    def last_of_step(self) -> int:
        """The layer that ends a step of the model itself."""
        return self.num_layers - self.num_draft_layers - 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one activation row on the wire."""
        return self.hidden_size * self.dtype.itemsize

    def check_placement(self, placement: Placement) -> None:
        """ValueError for a placement of another model."""
        check_same_model("the placement", placement, "the model", self)

    def check_call(
        self, layer: int, x_TD: torch.Tensor, topk_weights_TK: torch.Tensor, topk_ids_TK: torch.Tensor
    ) -> None:
        """ValueError for what does not fit this shape: the packing works on addresses and would read past the end."""
        num_tokens = x_TD.shape[0]
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer {layer}, expected 0 to {self.num_layers - 1}")
        if x_TD.shape != (num_tokens, self.hidden_size) or x_TD.dtype != self.dtype:
            raise ValueError(
                f"activations are {x_TD.dtype} {list(x_TD.shape)}, expected {self.dtype} [T, {self.hidden_size}]"
            )
        expected = (num_tokens, self.top_k)
        if topk_ids_TK.shape != expected or topk_weights_TK.shape != expected:
            raise ValueError(
                f"top-k ids {list(topk_ids_TK.shape)} and weights {list(topk_weights_TK.shape)}, "
                f"expected both {list(expected)}"
            )


class CallCheck:
    """`LayerShape.check_call` for calls that mostly look like the one before: those take it a microsecond less."""

    def __init__(self, shape: LayerShape) -> None:
        self._shape, self._num_layers, self._dtype = shape, shape.num_layers, shape.dtype
        self._x_size = self._pairs_size = torch.Size()

    def __call__(
        self, layer: int, x_TD: torch.Tensor, topk_weights_TK: torch.Tensor, topk_ids_TK: torch.Tensor
    ) -> None:
        """ValueError as `LayerShape.check_call`."""
        x_size, pairs_size = x_TD.shape, topk_ids_TK.shape
        if (
            x_size == self._x_size
            and pairs_size == self._pairs_size
            and topk_weights_TK.shape == pairs_size
            and x_TD.dtype is self._dtype
            and 0 <= layer < self._num_layers
        ):
            return
        self._shape.check_call(layer, x_TD, topk_weights_TK, topk_ids_TK)
        self._x_size, self._pairs_size = x_size, pairs_size
