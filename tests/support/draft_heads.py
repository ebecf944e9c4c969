"""Small models without experts that guess tokens for the tiny one: what `speculative_config.model` may name.

Each hands on what the tiny model computed, so that it guesses that the same is said once more, which is right now and
then.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TINY = Path(__file__).parents[2] / "examples" / "tiny-moe"
WIDTH = 16  # of MLPs that give nothing


def dense_draft(folder: Path, **config: Any) -> Path:
    """The tiny model without its experts; `config`: further values of config.json."""
    told = json.loads((TINY / "config.json").read_text())
    tensors = {name: t for name, t in load_file(TINY / "model.safetensors").items() if ".mlp." not in name}
    for layer in range(told["num_hidden_layers"]):
        tensors |= _mlp(f"model.layers.{layer}.", told["hidden_size"])
    kept = {key: value for key, value in told.items() if "expert" not in key and "moe" not in key}
    kept |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "intermediate_size": WIDTH}
    return _write(folder, tensors, {**kept, **config})


def medusa(folder: Path) -> Path:
    """Two heads."""
    hidden, vocab, embedding = _sizes()
    tensors = {}
    for head in range(2):
        tensors[f"blocks.{head}.layers.0.weight"] = torch.zeros(hidden, hidden)
        tensors[f"lm_heads.{head}.weight"] = embedding.clone()
    config = {"architectures": ["MedusaModel"], "model_type": "medusa", "hidden_size": hidden, "vocab_size": vocab}
    return _write(folder, tensors, {**config, "num_heads": 2, "num_hidden_layers": 1})


def eagle(folder: Path) -> Path:
    """A layer that hands on the model's last state."""
    hidden, _, _ = _sizes()
    tensors = {"fc.weight": torch.cat([torch.zeros(hidden, hidden), torch.eye(hidden)], 1)}
    tensors |= _attention("layers.0.", hidden, hidden) | _mlp("layers.0.", hidden)
    tensors["layers.0.post_attention_layernorm.weight"] = torch.ones(hidden)
    return _write(folder, tensors, _llama())


def eagle3(folder: Path) -> Path:
    """A layer that hands on the state after the model's last layer, with a little of those after the first two."""
    hidden, _, embedding = _sizes()
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(hidden, 2 * hidden, generator=generator) * 0.1 / hidden**0.5
    tensors = {"fc.weight": torch.cat([noise, torch.eye(hidden)], 1), "lm_head.weight": embedding.clone()}
    tensors |= _attention("midlayer.", 2 * hidden, hidden) | _mlp("midlayer.", hidden)
    for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
        tensors[f"midlayer.{name}.weight"] = torch.ones(hidden)
    tensors["norm.weight"] = load_file(TINY / "model.safetensors")["model.norm.weight"]
    layers = json.loads((TINY / "config.json").read_text())["num_hidden_layers"]
    return _write(folder, tensors, {**_llama(), "eagle_aux_hidden_state_layer_ids": [1, 2, layers]})


def dflash(folder: Path, guess: int) -> Path:
    """A head that makes all guesses at once, and guesses the token `guess` always."""
    hidden, _, _ = _sizes()
    tensors = {"fc.weight": torch.cat([torch.zeros(hidden, 2 * hidden), torch.eye(hidden)], 1)}
    tensors |= _attention("layers.0.", hidden, hidden) | _mlp("layers.0.", hidden)
    for name in ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "hidden_norm", "norm"):
        tensors[f"{name}.weight"] = torch.ones(hidden)
    config = {**_llama(), "head_dim": hidden // 4, "rms_norm_eps": 1e-6}
    for name in "qk":
        tensors[f"layers.0.self_attn.{name}_norm.weight"] = torch.ones(config["head_dim"])
    config |= {"architectures": ["DFlashDraftModel"], "model_type": "qwen3"}
    return _write(folder, tensors, {**config, "dflash_config": {"mask_token_id": guess, "target_layer_ids": [0, 1, 3]}})


def config_alone(folder: Path, method: str) -> Path:
    """What a method that vLLM does not run here is refused by."""
    config = {**_llama(), "architectures": ["Qwen3DSparkModel"], "model_type": "qwen3", "block_size": 4}
    if method == "mlp_speculator":
        hidden, vocab, _ = _sizes()
        config = {"architectures": ["MLPSpeculatorPreTrainedModel"], "model_type": "mlp_speculator"}
        config |= {"emb_dim": hidden, "vocab_size": vocab, "n_predict": 2, "top_k_tokens_per_head": [2, 1]}
    return _write(folder, {}, config)


class SameAgain:
    """A class for `method: custom_class`, which guesses that the last token comes once more."""

    def __init__(self, _config: Any) -> None:
        pass

    def load_model(self, _model: Any) -> None:
        """There is none."""

    def propose(self, sampled: list[list[int]], *_: Any, **_more: Any) -> list[list[int]]:
        """A guess for each request that has got a token."""
        return [ids[-1:] for ids in sampled]


def _attention(prefix: str, inputs: int, hidden: int) -> dict[str, torch.Tensor]:
    """One that gives nothing."""
    sizes = {name: (hidden, hidden if name == "o" else inputs) for name in "qkvo"}
    return {f"{prefix}self_attn.{name}_proj.weight": torch.zeros(size) for name, size in sizes.items()}


def _mlp(prefix: str, hidden: int) -> dict[str, torch.Tensor]:
    """One that gives nothing."""
    sizes = {"gate": (WIDTH, hidden), "up": (WIDTH, hidden), "down": (hidden, WIDTH)}
    return {f"{prefix}mlp.{name}_proj.weight": torch.zeros(size) for name, size in sizes.items()}


def _llama() -> dict[str, Any]:
    hidden, vocab, _ = _sizes()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "vocab_size": vocab}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": WIDTH}
    return {**config, "max_position_embeddings": 1024}


def _sizes() -> tuple[int, int, torch.Tensor]:
    """Hidden size, vocabulary and embedding of the tiny model."""
    embedding = load_file(TINY / "model.safetensors")["model.embed_tokens.weight"]
    return embedding.shape[1], embedding.shape[0], embedding


def _write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder
