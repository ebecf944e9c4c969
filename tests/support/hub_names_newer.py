"""As hub_names.py, for the schemes that came later. Names are those of the hub, or what vLLM's own loader looks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.support.expected_experts import PROJ, W132, D, E, Expected, I, one_tensor_per_matrix

_SIZES: dict[str, Any] = {"hidden_size": D, "num_hidden_layers": 4, "hidden_act": "silu", "num_experts_per_tok": 2}


def after_a_dense_layer(model_type: str, experts: str, **config: Any) -> Expected:
    """DeepSeek's names; `experts` is the key of their number."""
    values = {**_SIZES, "model_type": model_type, experts: E, "moe_intermediate_size": I, "intermediate_size": 40}
    if not config:
        config = {"first_k_dense_replace": 1}
    out = one_tensor_per_matrix({**values, **config}, (1, 2, 3), "model.layers.{l}.mlp.experts.{e}.", PROJ)
    out.tensors["model.layers.1.mlp.shared_experts.gate_proj.weight"] = torch.zeros(I, D)
    return out


def glm4v_moe() -> Expected:
    """A vision-language model, whose language model is GLM-4.5's."""
    inner = {**after_a_dense_layer("glm4v_moe_text", "n_routed_experts").config}
    config = {"model_type": "glm4v_moe", "text_config": inner}
    return one_tensor_per_matrix(config, (1, 2, 3), "model.language_model.layers.{l}.mlp.experts.{e}.", PROJ)


def fused(config: dict[str, Any], stem: str) -> Expected:
    """All experts of each of 4 layers in two tensors, gate before up."""
    out = Expected({**_SIZES, **config}).draw(range(4))
    for layer in range(4):
        gate, up, down = (torch.stack(weights) for weights in zip(*out.layer(layer), strict=True))
        out.tensors[stem.format(l=layer) + "gate_up_proj"] = torch.cat([gate, up], dim=1)
        out.tensors[stem.format(l=layer) + "down_proj"] = down
    return out


def qwen3_5_moe_text() -> Expected:
    config = {"model_type": "qwen3_5_moe_text", "num_experts": E, "moe_intermediate_size": I}
    return fused(config, "model.layers.{l}.mlp.experts.")


def qwen3_5_moe() -> Expected:
    out = qwen3_5_moe_text()
    out.config = {"model_type": "qwen3_5_moe", "text_config": out.config}
    out.tensors = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in out.tensors.items()}
    return out


def gemma4_text() -> Expected:
    config = {"model_type": "gemma4_text", "num_experts": E, "top_k_experts": 2, "moe_intermediate_size": I}
    config |= {"hidden_activation": "gelu_pytorch_tanh", "intermediate_size": 40}
    out = fused(config, "model.layers.{l}.experts.")
    out.tensors["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(40, D)
    out.tensors["model.layers.0.router.per_expert_scale"] = torch.ones(E)
    return out


def gemma4() -> Expected:
    out = gemma4_text()
    out.config = {"model_type": "gemma4", "text_config": out.config}
    out.tensors = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in out.tensors.items()}
    return out


def granitemoe_swa() -> Expected:
    config = {"model_type": "granitemoe_swa", "num_local_experts": E, "intermediate_size": I}
    return fused(config, "model.layers.{l}.block_sparse_moe.experts.")


def granitemoehybrid() -> Expected:
    config = {**_SIZES, "model_type": "granitemoehybrid", "num_local_experts": E, "intermediate_size": I}
    out = Expected(config).draw(range(4))
    for layer in range(4):
        gate, up, down = (torch.stack(weights) for weights in zip(*out.layer(layer), strict=True))
        stem = f"model.layers.{layer}."
        out.tensors[f"{stem}block_sparse_moe.input_linear.weight"] = torch.cat([gate, up], dim=1)
        out.tensors[f"{stem}block_sparse_moe.output_linear.weight"] = down
        out.tensors[f"{stem}shared_mlp.output_linear.weight"] = torch.zeros(D, 5)
    return out


def step3_text() -> Expected:
    config = {"model_type": "step3_text", "moe_num_experts": E, "moe_top_k": 2, "moe_intermediate_size": I}
    out = Expected({**_SIZES, **config, "moe_layers_enum": "1,3"}).draw((1, 3))
    for layer in (1, 3):
        for name, weights in zip(PROJ, zip(*out.layer(layer), strict=True), strict=True):
            out.tensors[f"model.layers.{layer}.moe.{name}"] = torch.stack(weights)
    return out


def jamba() -> Expected:
    config = {**_SIZES, "model_type": "jamba", "num_experts": E, "intermediate_size": I}
    config |= {"expert_layer_offset": 1, "expert_layer_period": 2}
    out = one_tensor_per_matrix(config, (1, 3), "model.layers.{l}.feed_forward.experts.{e}.", PROJ)
    out.tensors["model.layers.0.feed_forward.gate_proj.weight"] = torch.zeros(I, D)
    return out


def kimi_linear() -> Expected:
    config = {**_SIZES, "model_type": "kimi_linear", "num_experts": E, "num_experts_per_token": 2}
    config |= {"moe_intermediate_size": I, "first_k_dense_replace": 1, "moe_layer_freq": 1}
    del config["num_experts_per_tok"]
    return one_tensor_per_matrix(config, (1, 2, 3), "model.layers.{l}.block_sparse_moe.experts.{e}.", W132)


def hunyuan_v1_moe() -> Expected:
    config = {**_SIZES, "model_type": "hunyuan_v1_moe", "num_experts": E, "intermediate_size": 40}
    config |= {"moe_intermediate_size": [I] * 4, "moe_topk": [2] * 4}
    return one_tensor_per_matrix(config, range(4), "model.layers.{l}.mlp.experts.{e}.", PROJ)


def solar_open() -> Expected:
    config = {**_SIZES, "model_type": "solar_open", "n_routed_experts": E, "moe_intermediate_size": I}
    return one_tensor_per_matrix(config, range(4), "model.layers.{l}.mlp.experts.{e}.", PROJ)


def flex_olmo() -> Expected:
    config = {**_SIZES, "model_type": "flex_olmo", "num_experts": E, "intermediate_size": I}
    return one_tensor_per_matrix(config, range(4), "model.layers.{l}.mlp.experts.{e}.", PROJ)


NEWER_MAKERS: dict[str, Callable[[], Expected]] = {
    **{
        t: lambda t=t: after_a_dense_layer(t, "n_routed_experts")
        for t in ("deepseek", "dots1", "axk1", "pangu_ultra_moe")
    },
    **{
        t: lambda t=t: after_a_dense_layer(t, "num_experts")
        for t in ("bailing_moe", "bailing_moe_v2", "bailing_hybrid", "sarvam_moe", "sarvam_mla")
    },
    "mellum": lambda: after_a_dense_layer("mellum", "num_local_experts", mlp_layer_types=["dense"] + ["sparse"] * 3),
    "laguna": lambda: after_a_dense_layer("laguna", "num_experts", mlp_layer_types=["dense"] + ["sparse"] * 3),
    "mimo_v2_flash": lambda: after_a_dense_layer("mimo_v2_flash", "n_routed_experts", moe_layer_freq=[0, 1, 1, 1]),
    "glm4v_moe": glm4v_moe,
    "qwen3_5_moe_text": qwen3_5_moe_text,
    "qwen3_5_moe": qwen3_5_moe,
    "gemma4_text": gemma4_text,
    "gemma4": gemma4,
    "granitemoe_swa": granitemoe_swa,
    "granitemoehybrid": granitemoehybrid,
    "step3_text": step3_text,
    "jamba": jamba,
    "kimi_linear": kimi_linear,
    "hunyuan_v1_moe": hunyuan_v1_moe,
    "flex_olmo": flex_olmo,
    "solar_open": solar_open,
}
