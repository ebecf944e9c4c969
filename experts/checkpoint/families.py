"""One entry a model family: where it keeps its experts. The names are those of the checkpoints on the Hugging Face hub,
which transformers 5 writes too (`save_pretrained` reverts its own fused tensors to them unless asked not to).

To add a family, add an entry to `FAMILIES` and its tensor names to `tests/experts/checkpoint/test_families.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from experts.checkpoint.errors import CheckpointError
from experts.checkpoint.hf_config import ModelConfig
from experts.checkpoint.layout import Family, Layout, Part
from experts.model.spec import ActivationSpec

ACTIVATIONS = {
    "silu": ActivationSpec("silu"),
    "swish": ActivationSpec("silu"),
    "gelu": ActivationSpec("gelu"),
    "gelu_new": ActivationSpec("gelu_tanh"),
    "gelu_pytorch_tanh": ActivationSpec("gelu_tanh"),
}


def activation_named(name: str) -> ActivationSpec:
    """The gated activation that a configuration's `hidden_act` names."""
    if name not in ACTIVATIONS:
        raise CheckpointError(f"activation {name!r} is not supported; expected one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


# --- which decoder layers have routed experts ---------------------------------------------------------------------


def every_layer(config: ModelConfig) -> Sequence[int]:
    """All of them: Mixtral, OLMoE, gpt-oss, MiniMax-M2, DBRX."""
    return range(config.int_of("num_hidden_layers", "n_layers"))


def every_sparse_step(config: ModelConfig) -> Sequence[int]:
    """Qwen: every `decoder_sparse_step`-th, but for those in `mlp_only_layers`."""
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers", [])
    return [i for i in every_layer(config) if i not in dense and step > 0 and (i + 1) % step == 0]


def after_dense_layers(config: ModelConfig) -> Sequence[int]:
    """DeepSeek, GLM: from `first_k_dense_replace` on, every `moe_layer_freq`-th; `mlp_layer_types` spells it out."""
    types = config.get("mlp_layer_types")
    if types is not None:
        return [i for i in every_layer(config) if types[i] == "sparse"]
    first, step = config.get("first_k_dense_replace", 0), config.get("moe_layer_freq", 1)
    return [i for i in every_layer(config) if i >= first and i % step == 0]


def interleaved_layers(config: ModelConfig) -> Sequence[int]:
    """Llama 4: `moe_layers`, or every `interleave_moe_layer_step`-th."""
    layers = config.get("moe_layers")
    if layers is not None:
        return sorted(layers)
    step = config.get("interleave_moe_layer_step", 1)
    return [i for i in every_layer(config) if step > 0 and (i + 1) % step == 0]


# --- how experts are stored ---------------------------------------------------------------------------------------


def expert_a_tensor(module: str, gate: str, up: str, down: str) -> Layout:
    """Three matrices an expert: `layers.3.<module>.experts.7.<gate>.weight`."""
    stem = f"layers.{{layer}}.{module}.experts.{{expert}}."
    return Layout(
        (
            Part("gate", f"{stem}{gate}.weight"),
            Part("up", f"{stem}{up}.weight"),
            Part("down", f"{stem}{down}.weight"),
        )
    )


def fused(module: str, *, transposed: bool, interleaved: bool = False, bias: bool = False) -> Layout:
    """Two tensors a layer with all experts: `layers.3.<module>.experts.gate_up_proj` and `.down_proj`."""
    stem = f"layers.{{layer}}.{module}.experts."
    parts = [
        Part("gate_up", f"{stem}gate_up_proj", "leading", transposed=transposed, interleaved=interleaved),
        Part("down", f"{stem}down_proj", "leading", transposed=transposed),
    ]
    if bias:
        parts.append(Part("gate_up_bias", f"{stem}gate_up_proj_bias", "leading", interleaved=interleaved))
        parts.append(Part("down_bias", f"{stem}down_proj_bias", "leading"))
    return Layout(tuple(parts))


GATE_UP_DOWN = expert_a_tensor("mlp", "gate_proj", "up_proj", "down_proj")
W1_W3_W2 = expert_a_tensor("block_sparse_moe", "w1", "w3", "w2")
# What `save_pretrained(save_original_format=False)` of transformers 5 writes for all of these.
FUSED_BY_TRANSFORMERS = fused("mlp", transposed=False)

# --- the entries --------------------------------------------------------------------------------------------------


def gpt_oss_activation(config: ModelConfig) -> ActivationSpec:
    """gpt-oss: alpha is fixed at 1.702 in its published code, the clamp is in the configuration."""
    return ActivationSpec("swigluoai", config.get("swiglu_alpha", 1.702), config.get("swiglu_limit", 7.0))


FAMILIES = (
    # `num_experts` on the hub, `num_local_experts` where transformers 5 wrote it.
    Family(("qwen2_moe", "qwen3_moe", "qwen3_next"), (GATE_UP_DOWN, FUSED_BY_TRANSFORMERS), every_sparse_step),
    # As Qwen3-MoE, but every expert of a layer in one transposed tensor, under a vision-language model.
    Family(("qwen3_vl_moe", "qwen3_vl_moe_text"), (fused("mlp", transposed=True),), every_sparse_step),
    Family(("olmoe",), (GATE_UP_DOWN, FUSED_BY_TRANSFORMERS), every_layer, intermediate_size=("intermediate_size",)),
    Family(
        ("mixtral", "minimax_m2"),
        (W1_W3_W2, FUSED_BY_TRANSFORMERS),
        every_layer,
        intermediate_size=("intermediate_size",),
    ),
    # Kimi-K2 is a DeepSeek-V3, GLM-5 (glm_moe_dsa) a DeepSeek-V3.2 by its names. Layers past num_hidden_layers are
    # multi-token prediction heads and not read.
    Family(
        (
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "kimi_k2",
            "kimi_k25",
            "glm4_moe",
            "glm4_moe_lite",
            "glm_moe_dsa",
        ),
        (GATE_UP_DOWN, FUSED_BY_TRANSFORMERS),
        after_dense_layers,
    ),
    # gate and up alternate: row 0 is gate 0, row 1 up 0. In MXFP4 (the hub) not transposed, in floats transposed.
    Family(
        ("gpt_oss",),
        (fused("mlp", transposed=True, interleaved=True, bias=True),),
        every_layer,
        intermediate_size=("intermediate_size",),
        activation=gpt_oss_activation,
    ),
    # All experts of a layer as one tall matrix; w1 is gate, v1 is up, w2 is stored [I, D].
    Family(
        ("dbrx",),
        (
            Layout(
                (
                    Part("gate", "blocks.{layer}.ffn.experts.mlp.w1", "rows"),
                    Part("up", "blocks.{layer}.ffn.experts.mlp.v1", "rows"),
                    Part("down", "blocks.{layer}.ffn.experts.mlp.w2", "rows", transposed=True),
                ),
                prefixes=("transformer.",),
            ),
        ),
        every_layer,
        num_experts=("ffn_config.moe_num_experts",),
        top_k=("ffn_config.moe_top_k",),
        hidden_size=("d_model",),
        intermediate_size=("ffn_config.ffn_hidden_size",),
        activation=lambda config: activation_named(config.str_of("ffn_config.ffn_act_fn.name", "silu")),
    ),
    # Transposed halves, and the router weight scales an expert's input.
    Family(
        ("llama4", "llama4_text"),
        (fused("feed_forward", transposed=True),),
        interleaved_layers,
        intermediate_size=("intermediate_size",),
        weight_on_input=True,
    ),
)


def activation_of(family: Family, config: ModelConfig) -> ActivationSpec:
    """The activation of a family's experts: its own rule, or the function that `hidden_act` names."""
    return family.activation(config) if family.activation else activation_named(config.str_of("hidden_act", "silu"))


def family_of(config: ModelConfig) -> Family:
    """The entry that serves a model type; CheckpointError names the known ones."""
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    known = sorted(name for family in FAMILIES for name in family.model_types)
    raise CheckpointError(f"{config.path}: model_type {config.model_type!r} is not known; expected one of {known}")
