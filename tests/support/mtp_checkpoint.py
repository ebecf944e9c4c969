"""Random checkpoints with a layer for multi-token prediction (MTP), named as on the hub; transformers leaves it out.

Its guesses are often right, by its experts: which token follows is decided by the embedding of the one before and the
MLP of the last decoder layer, of which the MTP layer has a copy. That one's experts are numbered the other way round,
so that nobody takes a decoder layer's experts for them unnoticed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.random_checkpoints import make_checkpoint

DAMPED, LEAKED = 0.02, 0.05  # what all else adds to a row, and how much of the hidden state the MTP layer gets
_OUTPUTS = ("o_proj.weight", "down_proj.weight", "out_proj.weight")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def make_mtp_checkpoint(family: str, path: str | Path, **overrides: Any) -> Path:
    """Write a checkpoint of `family` with one MTP layer and return its folder; `overrides` of its configuration."""
    folder = make_checkpoint(family, path, **overrides)
    config = json.loads((folder / "config.json").read_text())
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    apart = family == "qwen3_next"
    copied, mtp = f"model.layers.{layers - 1}.", "mtp.layers.0." if apart else f"model.layers.{layers}."
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith(_OUTPUTS) and not name.startswith(f"{copied}mlp."):
            tensors[name] *= DAMPED
    last_expert = max(int(found[1]) for name in tensors if (found := _EXPERT.search(name)))
    for name in [name for name in tensors if name.startswith(copied)]:
        tensor = tensors[name].flip(0) if ".mlp.gate." in name else tensors[name].clone()
        renumbered = _EXPERT.sub(lambda found: f".experts.{last_expert - int(found[1])}.", name)
        tensors[renumbered.replace(copied, mtp)] = tensor.contiguous()
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(hidden, hidden, generator=generator) * LEAKED / hidden**0.5
    joint = torch.cat([torch.eye(hidden), noise], 1)
    if apart:
        tensors |= {
            "mtp.fc.weight": joint,
            "mtp.pre_fc_norm_embedding.weight": torch.zeros(hidden),  # a norm's weight is 1 more there
            "mtp.pre_fc_norm_hidden.weight": torch.zeros(hidden),
            "mtp.norm.weight": tensors["model.norm.weight"].clone(),
        }
    else:
        tensors |= {
            f"{mtp}eh_proj.weight": joint,
            f"{mtp}enorm.weight": torch.ones(hidden),
            f"{mtp}hnorm.weight": torch.ones(hidden),
            f"{mtp}shared_head.norm.weight": tensors["model.norm.weight"].clone(),
            f"{mtp}shared_head.head.weight": tensors["lm_head.weight"].clone(),
            f"{mtp}embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
        }
        config["num_nextn_predict_layers"] = 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
