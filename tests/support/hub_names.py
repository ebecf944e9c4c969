"""Synthetic checkpoints with the exact tensor names and shapes of the Hugging Face hub, one maker for each scheme.

Independent of the reader's tables: names are spelled out here as in the published checkpoints. A maker returns the
configuration, the stored tensors, and the experts that the reader must return, in float32. To test a new naming scheme,
write a maker and add it to `MAKERS`.

Legend: E experts, D hidden size, I expert intermediate size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.support.expected_experts import PROJ, W132, D, E, Expected, I, one_tensor_per_matrix
from tests.support.hub_names_newer import NEWER_MAKERS


def qwen3_moe() -> Expected:
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 4, "num_experts": E, "num_experts_per_tok": 2}
    config |= {"hidden_size": D, "intermediate_size": 40, "moe_intermediate_size": I, "hidden_act": "silu"}
    config |= {"decoder_sparse_step": 1, "mlp_only_layers": [1]}
    return one_tensor_per_matrix(config, (0, 2, 3), "model.layers.{l}.mlp.experts.{e}.", PROJ)


def qwen2_moe() -> Expected:
    out = qwen3_moe()
    out = one_tensor_per_matrix(
        {**out.config, "model_type": "qwen2_moe", "decoder_sparse_step": 2, "mlp_only_layers": []},
        (1, 3),
        "model.layers.{l}.mlp.experts.{e}.",
        PROJ,
    )
    out.tensors["model.layers.1.mlp.shared_expert.gate_proj.weight"] = torch.zeros(I, D)
    return out


def mixtral() -> Expected:
    config = {"model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": E, "num_experts_per_tok": 2}
    config |= {"hidden_size": D, "intermediate_size": I, "hidden_act": "silu"}
    return one_tensor_per_matrix(config, (0, 1), "model.layers.{l}.block_sparse_moe.experts.{e}.", W132)


def minimax_m2(model_type: str) -> Expected:
    out = mixtral()
    out.config |= {"model_type": model_type}
    out.tensors["model.layers.0.block_sparse_moe.e_score_correction_bias"] = torch.zeros(E)
    return out


def olmoe() -> Expected:
    config = {"model_type": "olmoe", "num_hidden_layers": 2, "num_experts": E, "num_experts_per_tok": 2}
    config |= {"hidden_size": D, "intermediate_size": I, "hidden_act": "silu"}
    return one_tensor_per_matrix(config, (0, 1), "model.layers.{l}.mlp.experts.{e}.", PROJ)


def deepseek(model_type: str, prefix: str = "model.") -> Expected:
    config = {"model_type": model_type, "num_hidden_layers": 4, "n_routed_experts": E, "num_experts_per_tok": 2}
    config |= {"hidden_size": D, "intermediate_size": 40, "moe_intermediate_size": I, "hidden_act": "silu"}
    config |= {"first_k_dense_replace": 1, "moe_layer_freq": 1, "n_shared_experts": 1, "num_nextn_predict_layers": 1}
    out = one_tensor_per_matrix(config, (1, 2, 3), prefix + "layers.{l}.mlp.experts.{e}.", PROJ)
    # the multi-token prediction layer, which is not a decoder layer
    out.tensors[f"{prefix}layers.4.mlp.experts.0.gate_proj.weight"] = torch.zeros(I, D)
    out.tensors[f"{prefix}layers.1.mlp.shared_experts.gate_proj.weight"] = torch.zeros(I, D)
    return out


def deepseek_v2_alternating() -> Expected:
    out = deepseek("deepseek_v2")
    out.config["moe_layer_freq"] = 2
    out.experts = {key: value for key, value in out.experts.items() if key[0] == 2}
    return out


def kimi_k25() -> Expected:
    out = deepseek("kimi_k2", "language_model.model.")
    out.config = {"model_type": "kimi_k25", "text_config": out.config, "vision_config": {"hidden_size": 3}}
    return out


def glm_moe_dsa() -> Expected:
    out = deepseek("glm_moe_dsa")
    del out.config["moe_layer_freq"]
    out.config["mlp_layer_types"] = ["dense", "sparse", "sparse", "sparse"]
    return out


def exaone_moe(model_type: str) -> Expected:
    out = deepseek(model_type)
    out.config["num_experts"] = out.config.pop("n_routed_experts")
    out.config["num_shared_experts"] = out.config.pop("n_shared_experts")
    return out


def cohere2_moe() -> Expected:
    config = {"model_type": "cohere2_moe", "num_hidden_layers": 3, "num_experts": E, "num_experts_per_tok": 2}
    config |= {"hidden_size": D, "intermediate_size": I, "prefix_dense_intermediate_size": 40, "hidden_act": "silu"}
    config |= {"mlp_layer_types": ["dense", "sparse", "sparse"], "num_shared_experts": 1}
    return one_tensor_per_matrix(config, (1, 2), "model.layers.{l}.mlp.experts.{e}.", PROJ)


def ernie4_5_moe() -> Expected:
    config = {"model_type": "ernie4_5_moe", "num_hidden_layers": 6, "moe_num_experts": E, "moe_k": 2}
    config |= {"hidden_size": D, "intermediate_size": 40, "moe_intermediate_size": I, "hidden_act": "silu"}
    config |= {"moe_layer_start_index": 1, "moe_layer_end_index": 4, "moe_layer_interval": 2}
    return one_tensor_per_matrix(config, (1, 3), "model.layers.{l}.mlp.experts.{e}.", PROJ)


def ernie4_5_moe_to_the_end() -> Expected:
    out = ernie4_5_moe()
    config = {**out.config, "num_hidden_layers": 3, "moe_layer_end_index": -1, "moe_layer_interval": 1}
    return one_tensor_per_matrix(config, (1, 2), "model.layers.{l}.mlp.experts.{e}.", PROJ)


def afmoe() -> Expected:
    config = {"model_type": "afmoe", "num_hidden_layers": 3, "num_experts": E, "num_experts_per_tok": 2}
    config |= {"hidden_size": D, "intermediate_size": 40, "moe_intermediate_size": I, "hidden_act": "silu"}
    config |= {"num_dense_layers": 1, "num_shared_experts": 1}
    return one_tensor_per_matrix(config, (1, 2), "model.layers.{l}.mlp.experts.{e}.", PROJ)


def lfm2_moe() -> Expected:
    out = afmoe()
    config = {**out.config, "model_type": "lfm2_moe"}
    del config["hidden_act"]
    return one_tensor_per_matrix(config, (1, 2), "model.layers.{l}.feed_forward.experts.{e}.", W132)


def granitemoe(model_type: str) -> Expected:
    config = {"model_type": model_type, "num_hidden_layers": 2, "num_local_experts": E, "num_experts_per_tok": 2}
    config |= {"hidden_size": D, "intermediate_size": I, "hidden_act": "silu"}
    out = Expected(config).draw((0, 1))
    for layer in (0, 1):
        stem = f"model.layers.{layer}.block_sparse_moe."
        out.tensors[stem + "input_linear.weight"] = torch.stack([torch.cat([g, u]) for g, u, _ in out.layer(layer)])
        out.tensors[stem + "output_linear.weight"] = torch.stack([d for *_, d in out.layer(layer)])
    return out


def fused_by_transformers() -> Expected:
    """transformers 5 with `save_original_format=False`."""
    out = qwen3_moe()
    out.config["num_local_experts"] = out.config.pop("num_experts")
    out.tensors = {}
    for layer in (0, 2, 3):
        stem = f"model.layers.{layer}.mlp.experts."
        out.tensors[stem + "gate_up_proj"] = torch.stack([torch.cat([g, u]) for g, u, _ in out.layer(layer)])
        out.tensors[stem + "down_proj"] = torch.stack([d for *_, d in out.layer(layer)])
    return out


def qwen3_vl_moe() -> Expected:
    out = qwen3_moe()
    text = {**out.config, "model_type": "qwen3_vl_moe_text"}
    out.config = {"model_type": "qwen3_vl_moe", "text_config": text}
    out.tensors = transposed_halves(out, (0, 2, 3), "model.language_model.layers.{l}.mlp.experts.")
    return out


def transposed_halves(out: Expected, layers: Sequence[int], stem: str) -> dict[str, torch.Tensor]:
    tensors = {}
    for layer in layers:
        prefix = stem.format(l=layer)
        tensors[prefix + "gate_up_proj"] = torch.stack([torch.cat([g, u]).t() for g, u, _ in out.layer(layer)])
        tensors[prefix + "down_proj"] = torch.stack([d.t() for *_, d in out.layer(layer)])
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def llama4() -> Expected:
    text = {"model_type": "llama4_text", "num_hidden_layers": 4, "num_local_experts": E, "num_experts_per_tok": 1}
    text |= {"hidden_size": D, "intermediate_size": I, "intermediate_size_mlp": 40, "hidden_act": "silu"}
    text |= {"interleave_moe_layer_step": 2, "moe_layers": [1, 3]}
    out = Expected({"model_type": "llama4", "text_config": text, "vision_config": {"hidden_size": 3}}).draw((1, 3))
    out.tensors = transposed_halves(out, (1, 3), "language_model.model.layers.{l}.feed_forward.experts.")
    return out


def llama4_text() -> Expected:
    out = llama4()
    out.config = {key: value for key, value in out.config["text_config"].items() if key != "moe_layers"}
    out.tensors = {name.removeprefix("language_model."): tensor for name, tensor in out.tensors.items()}
    return out


def dbrx() -> Expected:
    config = {"model_type": "dbrx", "n_layers": 2, "d_model": D, "n_heads": 2}
    config |= {"ffn_config": {"ffn_hidden_size": I, "moe_num_experts": E, "moe_top_k": 2}}
    out = Expected(config).draw((0, 1))
    for layer in (0, 1):
        stem = f"transformer.blocks.{layer}.ffn.experts.mlp."
        out.tensors[stem + "w1"] = torch.cat([g for g, _, _ in out.layer(layer)])
        out.tensors[stem + "v1"] = torch.cat([u for _, u, _ in out.layer(layer)])
        out.tensors[stem + "w2"] = torch.cat([d.t() for *_, d in out.layer(layer)])
    return out


def gpt_oss() -> Expected:
    config = {"model_type": "gpt_oss", "num_hidden_layers": 2, "num_local_experts": E, "num_experts_per_tok": 2}
    config |= {"hidden_size": D, "intermediate_size": I, "hidden_act": "silu", "swiglu_limit": 7.0}
    out = Expected(config).draw((0, 1), bias=True)
    for layer in (0, 1):
        stem = f"model.layers.{layer}.mlp.experts."
        biases = [out.biases[layer, expert] for expert in range(E)]
        gate_up = torch.stack([interleave(g, u).t() for g, u, _ in out.layer(layer)])
        out.tensors[stem + "gate_up_proj"] = gate_up.contiguous()
        out.tensors[stem + "gate_up_proj_bias"] = torch.stack([interleave(b[:I], b[I:]) for b, _ in biases])
        out.tensors[stem + "down_proj"] = torch.stack([d.t() for *_, d in out.layer(layer)]).contiguous()
        out.tensors[stem + "down_proj_bias"] = torch.stack([b for _, b in biases])
    return out


def mxfp4_tensors(E: int, D: int, I: int) -> dict[str, torch.Tensor]:
    """Random routed experts of a gpt-oss layer 0 under the hub's names."""
    generator = torch.Generator().manual_seed(2)
    stem = "model.layers.0.mlp.experts."

    def bytes_of(*shape: int) -> torch.Tensor:
        return torch.randint(110, 135, shape, dtype=torch.uint8, generator=generator)

    return {
        stem + "gate_up_proj_blocks": bytes_of(E, 2 * I, D // 32, 16),
        stem + "gate_up_proj_scales": bytes_of(E, 2 * I, D // 32),
        stem + "gate_up_proj_bias": torch.randn(E, 2 * I, generator=generator).bfloat16(),
        stem + "down_proj_blocks": bytes_of(E, D, I // 32, 16),
        stem + "down_proj_scales": bytes_of(E, D, I // 32),
        stem + "down_proj_bias": torch.randn(E, D, generator=generator).bfloat16(),
    }


def interleave(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Rows gate 0, up 0, gate 1, up 1, ..."""
    return torch.stack([gate, up], dim=1).flatten(0, 1)


MAKERS: dict[str, Callable[[], Expected]] = {
    "qwen3_moe": qwen3_moe,
    "qwen2_moe": qwen2_moe,
    "mixtral": mixtral,
    **{t: lambda t=t: minimax_m2(t) for t in ("minimax_m2", "phimoe")},
    "olmoe": olmoe,
    **{t: lambda t=t: deepseek(t) for t in ("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "glm4_moe")},
    "deepseek_v2_alternating": deepseek_v2_alternating,
    "kimi_k25": kimi_k25,
    "glm_moe_dsa": glm_moe_dsa,
    **{t: lambda t=t: exaone_moe(t) for t in ("exaone_moe", "hy_v3")},
    "cohere2_moe": cohere2_moe,
    "ernie4_5_moe": ernie4_5_moe,
    "ernie4_5_moe_to_the_end": ernie4_5_moe_to_the_end,
    "afmoe": afmoe,
    "lfm2_moe": lfm2_moe,
    **{t: lambda t=t: granitemoe(t) for t in ("granitemoe", "granitemoeshared")},
    "fused_by_transformers": fused_by_transformers,
    "qwen3_vl_moe": qwen3_vl_moe,
    "llama4": llama4,
    "llama4_text": llama4_text,
    "dbrx": dbrx,
    "gpt_oss": gpt_oss,
    **NEWER_MAKERS,
}


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], num_files: int = 1) -> Path:
    """Write a checkpoint folder: config.json and one safetensors file, or several and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if num_files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for number in range(num_files):
        name = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::num_files]}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


FP8 = torch.float8_e4m3fn
FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def random_fp8(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """E4M3 weights of the size that checkpoints have, about 50."""
    return (torch.randn(shape, generator=generator) * 50).to(FP8)


def deepseek_fp8(folder: Path, D: int = 200, I: int = 136) -> tuple[Path, dict[str, torch.Tensor]]:
    """(folder, stored tensors) of DeepSeek-V3's experts in FP8 blocks: layer 1 of 2, two experts."""
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 2, "n_routed_experts": 2, "num_experts_per_tok": 1}
    config |= {"hidden_size": D, "moe_intermediate_size": I, "first_k_dense_replace": 1, "hidden_act": "silu"}
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for expert in range(2):
        for name, shape in (("gate_proj", (I, D)), ("up_proj", (I, D)), ("down_proj", (D, I))):
            stem = f"model.layers.1.mlp.experts.{expert}.{name}.weight"
            tensors[stem] = random_fp8(shape, generator)
            blocks = tuple(math.ceil(n / 128) for n in shape)
            tensors[stem + "_scale_inv"] = torch.rand(blocks, generator=generator)
    return write(folder, {**config, "quantization_config": FP8_CONFIG}, tensors), tensors
