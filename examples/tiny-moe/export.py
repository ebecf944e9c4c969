"""Writes a trained model as a Hugging Face checkpoint for transformers and vLLM."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_model import TinyMoe
from tiny_tokenizer import END_ID, END_OF_TEXT_ID, PAD_ID
from torch import Tensor
from transformers import Qwen3MoeConfig

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


def named_tensors(model: TinyMoe) -> dict[str, Tensor]:
    """The weights in bfloat16 under Qwen3-MoE's names, with a tensor for each expert's matrix."""
    tensors = {"model.embed_tokens.weight": model.embed_tokens, "model.norm.weight": model.norm.weight}
    for index, layer in enumerate(model.layers):
        prefix = f"model.layers.{index}."
        tensors[prefix + "input_layernorm.weight"] = layer.input_layernorm.weight
        tensors[prefix + "post_attention_layernorm.weight"] = layer.post_attention_layernorm.weight
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{prefix}self_attn.{name}.weight"] = getattr(layer.self_attn, name)
        for name in ("q_norm", "k_norm"):
            tensors[f"{prefix}self_attn.{name}.weight"] = getattr(layer.self_attn, name).weight
        tensors[prefix + "mlp.gate.weight"] = layer.mlp.gate
        for expert, (gate_up_DF, down_FD) in enumerate(zip(layer.mlp.gate_up, layer.mlp.down, strict=True)):
            gate_DF, up_DF = gate_up_DF.chunk(2, dim=1)
            for name, weight in (("gate_proj", gate_DF.t()), ("up_proj", up_DF.t()), ("down_proj", down_FD.t())):
                tensors[f"{prefix}mlp.experts.{expert}.{name}.weight"] = weight
    return {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}


def export(model: TinyMoe, target: Path) -> None:
    """Write weights and configuration into `target`; other files there stay."""
    target.mkdir(parents=True, exist_ok=True)
    sizes = model.config
    config = Qwen3MoeConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.moe_intermediate_size * sizes.num_experts_per_tok,
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_key_value_heads,
        head_dim=sizes.head_dim,
        num_experts=sizes.num_experts,
        num_experts_per_tok=sizes.num_experts_per_tok,
        moe_intermediate_size=sizes.moe_intermediate_size,
        norm_topk_prob=True,
        max_position_embeddings=sizes.max_position_embeddings,
        rope_theta=sizes.rope_theta,
        rms_norm_eps=sizes.rms_norm_eps,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=PAD_ID,
        architectures=["Qwen3MoeForCausalLM"],
        dtype="float32",
    )
    # Older readers know `num_experts`; transformers 5 writes another key.
    write_json(target / "config.json", {**config.to_diff_dict(), "num_experts": sizes.num_experts, "dtype": "float32"})
    save_file(named_tensors(model), target / "model.safetensors", metadata={"format": "pt"})
    (target / "model.safetensors").chmod(0o644)
    generation = {
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": [END_OF_TEXT_ID, END_ID],
        "pad_token_id": PAD_ID,
        "do_sample": True,
        "temperature": 0.5,
        "top_p": 0.95,
    }
    write_json(target / "generation_config.json", generation)


def export_tokenizer(folder: Path, target: Path) -> None:
    """Copy a saved tokenizer into `target`, with a class name that every release of transformers knows."""
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            shutil.copyfile(folder / name, target / name)
    settings = json.loads((target / "tokenizer_config.json").read_text())
    write_json(target / "tokenizer_config.json", {**settings, "tokenizer_class": "PreTrainedTokenizerFast"})


def write_json(path: Path, content: dict) -> None:
    """Write JSON, indented, with sorted keys and a newline at the end."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
