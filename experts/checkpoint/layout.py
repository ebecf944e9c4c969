"""The vocabulary for describing how a model family stores its experts; `families.py` has the entries.

Legend: E experts, D hidden size, I expert intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from experts.checkpoint.hf_config import ModelConfig
from experts.checkpoint.quantization.scheme import Scheme
from experts.model.spec import ActivationSpec

# What a stored tensor holds of one expert. Rows x columns as kernels expect them: gate and up [I, D], gate_up [2I, D],
# down [D, I]; the biases [2I] and [D].
Role = Literal["gate", "up", "gate_up", "down", "gate_up_bias", "down_bias"]
# How experts share a tensor: not at all, along a leading axis [E, rows, cols], or in one tall matrix [E * rows, cols].
Stack = Literal["none", "leading", "rows"]


@dataclass(frozen=True)
class Part:
    """One stored tensor. `name` contains {layer} and, if `stack` is "none", {expert}.

    `transposed`: stored as [cols, rows]. `interleaved`: rows alternate gate, up, gate, up instead of two halves.
    A quantized part has other tensors beside `name` or instead of it, which `quantization` names. Only FP8 squares
    are transposed where floats are; the other formats have the kernels' rows and columns.
    """

    role: Role
    name: str
    stack: Stack = "none"
    transposed: bool = False
    interleaved: bool = False

    def shape(self, hidden_size: int, intermediate_size: int) -> tuple[int, ...]:
        """Shape of one expert's share of this part, as kernels expect it (not transposed)."""
        D, I = hidden_size, intermediate_size
        return {
            "gate": (I, D),
            "up": (I, D),
            "gate_up": (2 * I, D),
            "down": (D, I),
            "gate_up_bias": (2 * I,),
            "down_bias": (D,),
        }[self.role]


@dataclass(frozen=True)
class Layout:
    """All parts of an expert, under one of several prefixes (multimodal models nest their language model)."""

    parts: tuple[Part, ...]
    prefixes: tuple[str, ...] = ("model.", "model.language_model.", "language_model.model.", "")

    @property
    def has_bias(self) -> bool:
        return any(part.role.endswith("_bias") for part in self.parts)


@dataclass(frozen=True)
class Family:
    """One entry: the model types it serves, their layouts on disk, and the keys of the numbers in config.json.

    Layouts and keys are tried in order. `moe_layers` maps the configuration to the decoder layers with routed experts.
    """

    model_types: tuple[str, ...]
    layouts: tuple[Layout, ...]
    moe_layers: Callable[[ModelConfig], Sequence[int]]
    num_experts: tuple[str, ...] = ("num_experts", "num_local_experts", "n_routed_experts")
    top_k: tuple[str, ...] = ("num_experts_per_tok",)
    hidden_size: tuple[str, ...] = ("hidden_size",)
    intermediate_size: tuple[str, ...] = ("moe_intermediate_size",)
    activation: Callable[[ModelConfig], ActivationSpec] | None = None  # None: the one that hidden_act names
    weight_on_input: bool = False

    def keeps(self, scheme: Scheme) -> bool:
        """Whether kernels can keep experts as they are stored, as far as config.json tells.

        A format that has tensors of all experts is taken to be in those, where the family has them. FP8 is not kept in
        transposed ones.
        """
        form, usual = scheme.kept, self.layouts[0].parts
        in_stack = scheme.in_stack() is not None and usual[0].stack == "leading"
        return form is not None and not (in_stack and form.name == "fp8_block" and any(p.transposed for p in usual))
