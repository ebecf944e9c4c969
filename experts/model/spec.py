"""What the routed experts of a model are: facts that kernels, shards and routers share.

Legend: D hidden size, I expert intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

ActivationKind = Literal["silu", "gelu", "gelu_tanh", "swigluoai"]


@dataclass(frozen=True)
class ActivationSpec:
    """The gated activation between the two expert matrices.

    `silu`, `gelu`, `gelu_tanh`: `act(gate) * up`. `swigluoai` (gpt-oss): gate clamped to at most `limit`, up clamped to
    `[-limit, limit]`, then `gate * sigmoid(alpha * gate) * (up + 1)`; `limit` None means no clamp.
    """

    kind: ActivationKind
    alpha: float = 1.702
    limit: float | None = None


@dataclass(frozen=True)
class ExpertSpec:
    """What a checkpoint's configuration says about its routed experts."""

    model_type: str
    layer_ids: tuple[int, ...]  # decoder layer of each MoE layer; dense layers are skipped, an MTP layer is one more
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    activation: ActivationSpec
    has_bias: bool
    weight_on_input: bool  # Llama 4: the router weight scales the expert's input, not its output
    quantization: str | None  # as stored: None or a name of weight_format; read_expert always returns plain floats
    num_mtp_layers: int = 0  # of `layer_ids`, the last ones, which predict further tokens

    @property
    def num_layers(self) -> int:
        """MoE layers: the rows of a placement."""
        return len(self.layer_ids)

    @property
    def num_decoder_layers(self) -> int:
        """MoE layers that every step goes through: all but those of multi-token prediction."""
        return len(self.layer_ids) - self.num_mtp_layers


@dataclass(frozen=True)
class ExpertWeights:
    """One expert in the layout that kernels expect: gate rows first, then up rows; never interleaved or transposed."""

    w13_2ID: torch.Tensor  # [2I, D]
    w2_DI: torch.Tensor  # [D, I]
    b13_2I: torch.Tensor | None = None  # [2I]
    b2_D: torch.Tensor | None = None  # [D]

    def to(self, device: torch.device) -> ExpertWeights:
        """The weights on another device; the same object if they are there already."""
        if self.w13_2ID.device == device:
            return self
        tensors = (self.w13_2ID, self.w2_DI, self.b13_2I, self.b2_D)
        return ExpertWeights(*(None if t is None else t.to(device) for t in tensors))  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        tensors = (self.w13_2ID, self.w2_DI, self.b13_2I, self.b2_D)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)
