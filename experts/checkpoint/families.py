"""One entry for each model family: where its checkpoints store the experts. Names are those of the Hugging Face hub;
transformers 5 writes the same ones (`save_pretrained` converts its fused tensors back unless told not to).

To add a naming scheme:

1. Add the model type to an entry of `FAMILIES` that fits, or add an entry: layouts, a rule for the layers that have
   experts, and the keys of config.json that differ from the defaults of `Family` (layout.py).
2. Add a maker with the hub's tensor names to `MAKERS` in tests/support/hub_names.py. The tests in
   tests/experts/checkpoint run for every maker, and fail for a model type without one.
"""

from __future__ import annotations

from collections.abc import Sequence

from experts.checkpoint.architectures.table import why_refused
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
    """All layers: Mixtral, OLMoE, gpt-oss, MiniMax-M2, DBRX."""
    return range(config.int_of("num_hidden_layers", "n_layers"))


def every_layer_if_any(config: ModelConfig) -> Sequence[int]:
    """All layers of a model with experts; a dense model of this type says that it has none: Gemma 4, Granite 4."""
    return every_layer(config) if config.get("num_experts") or config.get("num_local_experts") else []


def every_sparse_step(config: ModelConfig) -> Sequence[int]:
    """Qwen: every `decoder_sparse_step`-th layer, except those in `mlp_only_layers`."""
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers", [])
    return [i for i in every_layer(config) if i not in dense and step > 0 and (i + 1) % step == 0]


def after_dense_layers(config: ModelConfig) -> Sequence[int]:
    """DeepSeek, GLM: from `first_k_dense_replace`, every `moe_layer_freq`-th layer; or those in `mlp_layer_types`.

    MiMo-V2's `moe_layer_freq` says it of each layer.
    """
    types = config.get("mlp_layer_types")
    if types is not None:
        return [i for i in every_layer(config) if types[i] == "sparse"]
    first, step = config.get("first_k_dense_replace", 0), config.get("moe_layer_freq", 1)
    if isinstance(step, list):
        return [i for i in every_layer(config) if step[i]]
    return [i for i in every_layer(config) if i >= first and i % step == 0]


def interleaved_layers(config: ModelConfig) -> Sequence[int]:
    """Llama 4: `moe_layers`, or every `interleave_moe_layer_step`-th layer."""
    layers = config.get("moe_layers")
    if layers is not None:
        return sorted(layers)
    step = config.get("interleave_moe_layer_step", 1)
    return [i for i in every_layer(config) if step > 0 and (i + 1) % step == 0]


def between_ernie_layers(config: ModelConfig) -> Sequence[int]:
    """ERNIE 4.5: every `moe_layer_interval`-th layer from `moe_layer_start_index` to `moe_layer_end_index`."""
    layers = every_layer(config)
    first, step = config.get("moe_layer_start_index", 0), config.get("moe_layer_interval", 1)
    last = config.get("moe_layer_end_index", -1)
    return [i for i in layers if first <= i <= (last if last >= 0 else len(layers)) and (i + 1) % step == 0]


def after_num_dense_layers(config: ModelConfig) -> Sequence[int]:
    """LFM2, AFMoE: from `num_dense_layers`."""
    return [i for i in every_layer(config) if i >= config.get("num_dense_layers", 0)]


def listed_layers(config: ModelConfig) -> Sequence[int]:
    """Step3: those in `moe_layers_enum`, such as "4,5,6"; without it all but the first."""
    listed = config.get("moe_layers_enum")
    if listed is None:
        return every_layer(config)[1:]
    return sorted({int(layer) for layer in (listed.split(",") if isinstance(listed, str) else listed)})


def every_expert_period(config: ModelConfig) -> Sequence[int]:
    """Jamba: from `expert_layer_offset`, every `expert_layer_period`-th layer."""
    offset, period = config.get("expert_layer_offset", 1), config.get("expert_layer_period", 2)
    return [i for i in every_layer(config) if i % period == offset]


# --- how experts are stored ---------------------------------------------------------------------------------------


def one_tensor_per_matrix(module: str, gate: str, up: str, down: str) -> Layout:
    """Three tensors for each expert: `layers.3.<module>.experts.7.<gate>.weight`."""
    stem = f"layers.{{layer}}.{module}.experts.{{expert}}." if module else "layers.{layer}.experts.{expert}."
    return Layout(
        (
            Part("gate", f"{stem}{gate}.weight"),
            Part("up", f"{stem}{up}.weight"),
            Part("down", f"{stem}{down}.weight"),
        )
    )


def fused(module: str, *, transposed: bool, interleaved: bool = False, bias: bool = False) -> Layout:
    """Two tensors for each layer, with all its experts: `layers.3.<module>.experts.gate_up_proj` and `.down_proj`."""
    stem = f"layers.{{layer}}.{module}.experts." if module else "layers.{layer}.experts."
    parts = [
        Part("gate_up", f"{stem}gate_up_proj", "leading", transposed=transposed, interleaved=interleaved),
        Part("down", f"{stem}down_proj", "leading", transposed=transposed),
    ]
    if bias:
        parts.append(Part("gate_up_bias", f"{stem}gate_up_proj_bias", "leading", interleaved=interleaved))
        parts.append(Part("down_bias", f"{stem}down_proj_bias", "leading"))
    return Layout(tuple(parts))


def stacked_linear(module: str) -> Layout:
    """Three tensors for each layer, with all its experts: `layers.3.<module>.gate_proj.weight` and so on."""
    stem = f"layers.{{layer}}.{module}."
    return Layout(
        (
            Part("gate", f"{stem}gate_proj.weight", "leading"),
            Part("up", f"{stem}up_proj.weight", "leading"),
            Part("down", f"{stem}down_proj.weight", "leading"),
        )
    )


def fused_linear(module: str) -> Layout:
    """The same as linear layers, gate before up: `layers.3.<module>.input_linear.weight`, `.output_linear.weight`."""
    stem = f"layers.{{layer}}.{module}."
    return Layout(
        (
            Part("gate_up", f"{stem}input_linear.weight", "leading"),
            Part("down", f"{stem}output_linear.weight", "leading"),
        )
    )


GATE_UP_DOWN = one_tensor_per_matrix("mlp", "gate_proj", "up_proj", "down_proj")
W1_W3_W2 = one_tensor_per_matrix("block_sparse_moe", "w1", "w3", "w2")
# Written by transformers 5 with `save_pretrained(save_original_format=False)`.
FUSED_BY_TRANSFORMERS = fused("mlp", transposed=False)

# --- the entries --------------------------------------------------------------------------------------------------


def gpt_oss_activation(config: ModelConfig) -> ActivationSpec:
    """gpt-oss: its published code fixes alpha at 1.702; the configuration has the clamp."""
    return ActivationSpec("swigluoai", config.get("swiglu_alpha", 1.702), config.get("swiglu_limit", 7.0))


FAMILIES = (
    # `num_experts` on the hub, `num_local_experts` if written by transformers 5.
    Family(
        ("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text"),
        (GATE_UP_DOWN, FUSED_BY_TRANSFORMERS),
        every_sparse_step,
    ),
    # Like Qwen3-MoE, but all experts of a layer in one transposed tensor, in a vision-language model. Tools that
    # quantize give each expert tensors of its own, here as for Gemma 4 and Llama 4.
    Family(("qwen3_vl_moe", "qwen3_vl_moe_text"), (fused("mlp", transposed=True), GATE_UP_DOWN), every_sparse_step),
    Family(
        ("olmoe", "flex_olmo"),
        (GATE_UP_DOWN, FUSED_BY_TRANSFORMERS),
        every_layer,
        intermediate_size=("intermediate_size",),
    ),
    Family(
        ("mixtral", "minimax_m2", "phimoe"),
        (W1_W3_W2, FUSED_BY_TRANSFORMERS),
        every_layer,
        intermediate_size=("intermediate_size",),
    ),
    # Kimi-K2 has DeepSeek-V3's names, GLM-5 (glm_moe_dsa) those of DeepSeek-V3.2. Layers past num_hidden_layers are
    # for multi-token prediction; architectures/mtp.py knows which of them are read.
    Family(
        (
            "deepseek",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "kimi_k2",
            "kimi_k25",
            "glm4_moe",
            "glm4_moe_lite",
            "glm4v_moe",
            "glm4v_moe_text",
            "glm_moe_dsa",
            "exaone_moe",
            "hy_v3",
            "dots1",
            "mellum",
            "axk1",
            "mimo_v2_flash",
            "pangu_ultra_moe",
            "bailing_moe",
            "bailing_moe_v2",
            "bailing_hybrid",
            "sarvam_moe",
            "sarvam_mla",
            "laguna",
        ),
        (GATE_UP_DOWN, FUSED_BY_TRANSFORMERS),
        after_dense_layers,
    ),
    Family(
        ("cohere2_moe",),
        (GATE_UP_DOWN, FUSED_BY_TRANSFORMERS),
        after_dense_layers,
        intermediate_size=("intermediate_size",),
    ),
    Family(
        ("ernie4_5_moe",),
        (GATE_UP_DOWN, FUSED_BY_TRANSFORMERS),
        between_ernie_layers,
        num_experts=("moe_num_experts",),
        top_k=("moe_k",),
    ),
    Family(("solar_open",), (GATE_UP_DOWN, FUSED_BY_TRANSFORMERS), every_layer),
    Family(("afmoe",), (GATE_UP_DOWN, FUSED_BY_TRANSFORMERS), after_num_dense_layers),
    Family(("lfm2_moe",), (one_tensor_per_matrix("feed_forward", "w1", "w3", "w2"),), after_num_dense_layers),
    Family(
        ("granitemoe", "granitemoeshared"),
        (fused_linear("block_sparse_moe"),),
        every_layer,
        intermediate_size=("intermediate_size",),
    ),
    Family(
        ("granitemoehybrid", "granitemoe_swa"),
        (fused_linear("block_sparse_moe"), fused("block_sparse_moe", transposed=False)),
        every_layer_if_any,
        intermediate_size=("intermediate_size",),
    ),
    # Numbers may be lists, of which all entries must be equal.
    Family(
        ("hunyuan_v1_moe",),
        (GATE_UP_DOWN, FUSED_BY_TRANSFORMERS),
        every_layer,
        top_k=("moe_topk", "num_experts_per_tok"),
        intermediate_size=("moe_intermediate_size", "intermediate_size"),
    ),
    # The experts stand beside a dense MLP, in the layer itself.
    Family(
        ("gemma4", "gemma4_text"),
        (fused("", transposed=False), one_tensor_per_matrix("", "gate_proj", "up_proj", "down_proj")),
        every_layer_if_any,
        top_k=("top_k_experts",),
        intermediate_size=("moe_intermediate_size", "expert_intermediate_size"),
        activation=lambda config: activation_named(config.str_of("hidden_activation")),
    ),
    Family(
        ("step3_text",),
        (stacked_linear("moe"),),
        listed_layers,
        num_experts=("moe_num_experts",),
        top_k=("moe_top_k",),
    ),
    Family(
        ("jamba",),
        (one_tensor_per_matrix("feed_forward", "gate_proj", "up_proj", "down_proj"),),
        every_expert_period,
        intermediate_size=("intermediate_size",),
    ),
    Family(("kimi_linear",), (W1_W3_W2,), after_dense_layers, top_k=("num_experts_per_token",)),
    # gate and up alternate: row 0 is gate 0, row 1 is up 0. Transposed in floats, not in MXFP4 (on the hub).
    Family(
        ("gpt_oss",),
        (fused("mlp", transposed=True, interleaved=True, bias=True),),
        every_layer,
        intermediate_size=("intermediate_size",),
        activation=gpt_oss_activation,
    ),
    # All experts of a layer in one tall matrix; w1 is gate, v1 is up, w2 is stored as [I, D].
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
    # Transposed halves; the router weight scales an expert's input.
    Family(
        ("llama4", "llama4_text"),
        (
            fused("feed_forward", transposed=True),
            one_tensor_per_matrix("feed_forward", "gate_proj", "up_proj", "down_proj"),
        ),
        interleaved_layers,
        intermediate_size=("intermediate_size",),
        weight_on_input=True,
    ),
)


def activation_of(family: Family, config: ModelConfig) -> ActivationSpec:
    """The activation of a family's experts: its own rule, or the one that `hidden_act` names."""
    return family.activation(config) if family.activation else activation_named(config.str_of("hidden_act", "silu"))


def family_of(config: ModelConfig) -> Family:
    """The entry for a model type. CheckpointError says why an architecture is refused, or names the known types."""
    reason = why_refused(config.values)
    if reason is not None:
        raise CheckpointError(f"{config.path}: {reason}")
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    known = sorted(name for family in FAMILIES for name in family.model_types)
    raise CheckpointError(f"{config.path}: model_type {config.model_type!r} is unknown; expected one of {known}")
