"""A folder with routed experts in one of `quantized_formats`, under the names of Qwen3-MoE."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support.hub_names import write
from tests.support.quantized_formats import Format

LAYERS, E, D, I = 2, 3, 128, 96


@dataclass
class Made:
    """The folder, its tensors and config.json, and float64 values of matrices by module (`...gate_proj`)."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    values: dict[str, np.ndarray]

    def write(self) -> Path:
        """Write it anew, after a change."""
        return write(self.folder, self.config, {name: tensor.contiguous() for name, tensor in self.tensors.items()})


def stem(layer: int, expert: int) -> str:
    """What names of an expert's modules begin with."""
    return f"model.layers.{layer}.mlp.experts.{expert}."


def quantized(folder: Path, form: Format, hidden: int = D, width: int = I) -> Made:
    """A checkpoint with random experts in a format; all tensors are of experts."""
    config: dict[str, Any] = {"model_type": "qwen3_moe", "num_hidden_layers": LAYERS, "hidden_size": hidden}
    config |= {"num_experts": E, "num_experts_per_tok": 2, "moe_intermediate_size": width, "hidden_act": "silu"}
    made = Made(folder, {**config, "quantization_config": form.config}, {}, {})
    rng = np.random.default_rng(5)
    for layer in range(LAYERS):
        for expert in range(E):
            for name, shape in (
                ("gate_proj", (width, hidden)),
                ("up_proj", (width, hidden)),
                ("down_proj", (hidden, width)),
            ):
                module = stem(layer, expert) + name
                matrix = form.make(*shape, rng, None)
                made.tensors |= {f"{module}.{each}": tensor for each, tensor in matrix.tensors.items()}
                made.values[module] = matrix.values
    made.write()
    return made
