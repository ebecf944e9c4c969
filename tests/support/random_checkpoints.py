"""Small random checkpoints of the supported families, for tests: float32, no tokenizer, sizes that vLLM runs on a CPU.

Weights are drawn so that comparing two engines is meaningful: logits are far apart, every layer's routed experts change
the result, correction and projection biases are not zero. Serve them with `skip_tokenizer_init=True` and prompts of
token ids below `VOCAB`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.support.family_configs import CONFIGS


def make_checkpoint(
    family: str, path: str | Path, *, seed: int = 0, zero_experts: bool = False, **overrides: Any
) -> Path:
    """Write a checkpoint of `family` (a key of transformers' CONFIG_MAPPING listed here) and return its folder.

    `overrides` go into the configuration. `zero_experts` writes zeros for the routed experts, so that a test can see
    whether they matter. Equal arguments give equal bytes.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    if family not in CONFIGS:
        raise ValueError(f"family is {family!r}, expected one of {sorted(CONFIGS)}")
    config = CONFIG_MAPPING[family](**{**CONFIGS[family], **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            _draw(name, tensor, generator, zero_experts)
    model.save_pretrained(path)
    return Path(path)


def _draw(name: str, tensor: torch.Tensor, generator: torch.Generator, zero_experts: bool) -> None:
    def normal(std: float, mean: float = 0.0) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)

    if ".experts." in name:
        # Right within a factor of two, transposed or not; biases are as large as a row's output.
        std = 0.5 if name.endswith("_bias") else 2.0 / tensor.shape[-1] ** 0.5
        normal(0.0 if zero_experts else std)
    elif name.endswith("e_score_correction_bias"):
        normal(0.2)
    elif "inv_freq" in name:
        return
    elif tensor.dim() == 1:
        normal(0.1, mean=1.0 if "norm" in name else 0.0)
    elif "embed_tokens" in name:
        normal(1.0)
    elif "lm_head" in name:
        normal(4.0 / tensor.shape[-1] ** 0.5)
    else:
        normal(1.0 / tensor.shape[-1] ** 0.5)
