"""From config.json to the tensors of a model, by architecture family.

D hidden size, I expert width, E experts of a layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from experts.checkpoint.architectures.mtp import check_mtp
from experts.checkpoint.errors import CheckpointError
from experts.checkpoint.families import family_of
from experts.checkpoint.hf_config import ModelConfig
from experts.checkpoint.layout import Family
from experts.checkpoint.sizes.attention import absorbed_values, attention_groups, attention_tensors, hidden_size
from placement.sizing.model import SERVED_BYTES, ModelFacts, Stored, Tensors

FLOAT_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
# Read and served, but their tensors beside the experts are not described here.
_NOT_SIZED = (
    *("exaone_moe", "hy_v3", "cohere2_moe", "ernie4_5_moe", "afmoe", "lfm2_moe"),
    *(
        "granitemoe",
        "granitemoeshared",
        "granitemoehybrid",
        "granitemoe_swa",
        "phimoe",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
    ),
    *("flex_olmo", "dots1", "solar_open", "mellum", "hunyuan_v1_moe", "axk1", "mimo_v2_flash", "pangu_ultra_moe"),
    *("bailing_moe", "bailing_moe_v2", "bailing_hybrid", "sarvam_moe", "sarvam_mla", "laguna", "glm4v_moe"),
    *("glm4v_moe_text", "gemma4", "gemma4_text", "step3_text", "jamba", "kimi_linear"),
)
_CORRECTED = (
    "deepseek_v3",
    "deepseek_v32",
    "kimi_k2",
    "kimi_k25",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "minimax_m2",
)


def facts_of(config: ModelConfig, name: str, notes: tuple[str, ...] = (), mtp: bool = False) -> ModelFacts:
    """The model that a configuration describes; `mtp`: with the layer for multi-token prediction served.

    CheckpointError names a key that is missing, a family that is not known, or attention that cannot be sized.
    """
    kind = config.model_type
    if kind in _NOT_SIZED:
        raise CheckpointError(f"{config.path}: {kind!r} is served, but its size is not known from config.json")
    family = family_of(config)
    moe = list(family.moe_layers(config))
    if not moe:
        raise CheckpointError(f"{config.path}: no layer of this {kind} has routed experts")
    if mtp:
        check_mtp(config)
        notes = (*notes, "of multi-token prediction memory is counted alone: times are those without guesses")
    layers = config.int_of("num_hidden_layers", "n_layers")
    D, V = hidden_size(config), config.int_of("vocab_size")
    E, I = config.int_of(*family.num_experts), config.int_of(*family.intermediate_size)
    tied = bool(config.get("tie_word_embeddings", False))
    tensors = [
        Tensors("embedding", "router", V, D),
        *([] if tied else [Tensors("output head", "router", V, D)]),
        *attention_tensors(config, layers),
        Tensors("norms", "router", D, 1, 2 * layers + 1),
        Tensors("gate", "router", E, D, len(moe)),
        *_gate_extras(config, E, D, len(moe)),
        *_shared(config, D, I, len(moe)),
        *_dense(config, D, layers - len(moe)),
        Tensors("routed experts", "experts", I, D, 2 * E * len(moe), "expert"),
        Tensors("routed experts", "experts", D, I, E * len(moe), "expert"),
    ]
    if kind == "gpt_oss":
        tensors += [
            Tensors("routed experts", "experts", 2 * I, 1, E * len(moe)),
            Tensors("routed experts", "experts", D, 1, E * len(moe)),
        ]
    stored = _stored(config, family)
    return ModelFacts(
        name=name,
        model_type=kind,
        num_layers=layers,
        moe_layers=len(moe),
        num_experts=E,
        top_k=config.int_of(*family.top_k),
        hidden_size=D,
        expert_width=I,
        vocab_size=V,
        tensors=tuple(tensors),
        stored=stored,
        attention=attention_groups(config, layers),
        max_positions=config.get("max_position_embeddings") or config.get("max_seq_len"),
        absorbed_values=absorbed_values(config, layers + mtp),
        mtp_router_bytes=_mtp_bytes(config, E, D, I, stored) if mtp else None,
        notes=(*notes, *_notes(config, family)),
    )


def _mtp_bytes(config: ModelConfig, E: int, D: int, I: int, stored: Stored) -> int:
    """What a router holds of the layer for multi-token prediction: its embedding and head are the model's."""
    held = replace(stored, float_bytes=SERVED_BYTES)
    tensors = [
        *attention_tensors(config, 1),
        Tensors("norms", "router", D, 1, 5),  # two of any layer, one for each input, one before the head
        Tensors("projection", "router", D, 2 * D),
        Tensors("gate", "router", E, D),
        *_gate_extras(config, E, D, 1),
        *_shared(config, D, I, 1),
    ]
    return sum(each.nbytes(held) for each in tensors)


def _notes(config: ModelConfig, family: Family) -> list[str]:
    scheme = config.scheme()
    if scheme is None or family.keeps(scheme):
        return []
    return [f"no kernel of a shard keeps {scheme.text}: experts are held in 16 bits"]


def _stored(config: ModelConfig, family: Family) -> Stored:
    scheme = config.scheme()
    dtype: Any = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    float_bytes = FLOAT_BYTES.get(str(dtype))
    if float_bytes is None:
        raise CheckpointError(f"{config.path}: dtype is {dtype!r}, expected one of {', '.join(FLOAT_BYTES)}")
    if scheme is None:
        return Stored(float_bytes=float_bytes)
    return Stored(scheme, float_bytes, dense=config.quantizes_dense, kept=family.keeps(scheme))


def _gate_extras(config: ModelConfig, E: int, D: int, moe: int) -> list[Tensors]:
    kind = config.model_type
    if kind in _CORRECTED or kind == "gpt_oss":  # a correction, or a bias
        return [Tensors("gate", "router", E, 1, moe)]
    if kind == "qwen2_moe":
        return [Tensors("shared experts", "router", 1, D, moe)]  # their gate
    return []


def _shared(config: ModelConfig, D: int, I: int, moe: int) -> list[Tensors]:
    width = config.get("shared_expert_intermediate_size") or I * int(config.get("n_shared_experts", 0))
    if config.model_type in ("llama4", "llama4_text"):
        width = I
    return _mlp("shared experts", D, int(width), moe)


def _dense(config: ModelConfig, D: int, layers: int) -> list[Tensors]:
    width = config.get("intermediate_size_mlp") or config.get("intermediate_size") or 0
    return _mlp("dense MLP", D, int(width), layers)


def _mlp(part: str, D: int, width: int, layers: int) -> list[Tensors]:
    if not width or not layers:
        return []
    return [
        Tensors(part, "router", width, D, 2 * layers, "linear"),
        Tensors(part, "router", D, width, layers, "linear"),
    ]
