"""Random LoRA adapters as PEFT saves them, and the oracle: a checkpoint with the adapter merged into its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

RANK, ALPHA = 4, 8


def layers_of(model: Path, wanted: Callable[[str], bool]) -> list[str]:
    """Names of a checkpoint's matrices, without `.weight`, that `wanted` takes; none of routed experts."""
    tensors = _tensors(model)
    names = [name.removesuffix(".weight") for name, tensor in tensors.items() if tensor.dim() == 2]
    return sorted(name for name in names if ".experts." not in name and wanted(name))


def write_adapter(folder: Path, model: Path, layers: list[str], *, seed: int = 1, size: float = 0.5) -> Path:
    """An adapter of rank 4 for these layers of a checkpoint, `size` times as large as their weights."""
    tensors = _tensors(model)
    generator = torch.Generator().manual_seed(seed)
    saved: dict[str, torch.Tensor] = {}
    for layer in layers:
        weight_OI = tensors[f"{layer}.weight"]
        a_RI = torch.randn(RANK, weight_OI.shape[1], generator=generator)
        b_OR = torch.randn(weight_OI.shape[0], RANK, generator=generator)
        a_RI *= size * weight_OI.norm() / (ALPHA / RANK * (b_OR @ a_RI).norm())
        saved[f"base_model.model.{layer}.lora_A.weight"] = a_RI
        saved[f"base_model.model.{layer}.lora_B.weight"] = b_OR
    write_files(folder, saved, sorted({layer.rpartition(".")[2] for layer in layers}))
    return folder


def write_files(folder: Path, tensors: dict[str, torch.Tensor], targets: list[str], **config: Any) -> None:
    """The two files of an adapter."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**values, **config}))


def merge(model: Path, adapter: Path, folder: Path) -> Path:
    """The checkpoint with W + alpha / rank * B A in place of each W, in float32. Returns the folder."""
    tensors = _tensors(model)
    change = load_file(adapter / "adapter_model.safetensors")
    for name, a_RI in change.items():
        if ".lora_A." in name:
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b_OR = change[name.replace(".lora_A.", ".lora_B.")]
            tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"] + ALPHA / RANK * b_OR @ a_RI
    copy_with(model, folder, tensors)
    return folder


def copy_with(model: Path, folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> None:
    """A checkpoint's folder with other tensors, and changed values of config.json."""
    folder.mkdir(parents=True)
    for path in model.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))


def untied(model: Path, folder: Path) -> Path:
    """A checkpoint whose head has weights of its own, equal to the embedding's, so that an adapter may change them."""
    tensors = _tensors(model)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    copy_with(model, folder, tensors, tie_word_embeddings=False)
    return folder


def _tensors(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")
