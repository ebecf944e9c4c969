"""Attention by architecture family: its tensors, and what a token takes in the KV cache.

D hidden size, H query heads, G KV heads, d head size.
"""

from __future__ import annotations

from dataclasses import replace

from experts.checkpoint.errors import CheckpointError
from experts.checkpoint.hf_config import ModelConfig
from placement.sizing.model import AttentionGroup, Tensors, attention_by_layer

# An indexer's cache in vLLM: fp8 keys, a float32 scale for each 128 values.
_INDEX_GROUP = 128
# Families whose q, k and v projections have a bias, whatever config.json says, or unless it denies it.
_QKV_BIAS = {"qwen2_moe": "qkv_bias"}
# Normed over all heads at once, or head by head.
_NORM_ALL_HEADS = ("olmoe", "minimax_m2")
_NORM_EACH_HEAD = ("qwen3_moe", "qwen3_vl_moe", "qwen3_vl_moe_text")


def attention_tensors(config: ModelConfig, layers: int) -> list[Tensors]:
    """Tensors of all attention modules, without the norms before and after them."""
    D = hidden_size(config)
    if config.get("kv_lora_rank"):
        return _latent_tensors(config, layers, D)
    H, G, d = heads(config)
    found = [
        _linear(H * d, D, layers),
        _linear(G * d, D, 2 * layers),
        _linear(D, H * d, layers),
    ]
    kind = config.model_type
    everywhere = kind == "gpt_oss"
    biased = config.get(_QKV_BIAS[kind], True) if kind in _QKV_BIAS else config.get("attention_bias", everywhere)
    if biased and kind != "dbrx":
        found += [_vector(H * d, layers), _vector(G * d, 2 * layers)]
        if kind in ("gpt_oss", "olmoe", "qwen3_moe", "llama4_text"):  # glm4_moe and qwen2_moe have none on the output
            found.append(_vector(D, layers))
    if kind == "gpt_oss":
        found.append(_vector(H, layers))  # sinks
    if kind in _NORM_ALL_HEADS:
        found += [_vector(H * d, layers), _vector(G * d, layers)]
    elif kind in _NORM_EACH_HEAD or (kind == "glm4_moe" and config.get("use_qk_norm", False)):
        found.append(_vector(d, 2 * layers))
    return found


def attention_groups(config: ModelConfig, layers: int) -> tuple[AttentionGroup, ...]:
    """The layers by what their KV cache holds. CheckpointError for attention that is not known."""
    if config.get("layer_types") and "linear_attention" in config.get("layer_types"):
        raise _unknown(config, "linear attention, whose state is no KV cache")
    if config.model_type == "qwen3_next":
        raise _unknown(config, "linear attention, whose state is no KV cache")
    if config.get("kv_lora_rank"):
        return _latent_groups(config, layers)
    H, G, d = heads(config)
    kind = "mqa" if G == 1 else "mha" if G == H else "gqa"
    return attention_by_layer(
        AttentionGroup(kind, 1, 2 * G * d, 4.0 * H * d, 4.0 * H * d, window=window, heads=H, kv_heads=G)
        for window in _windows(config, layers)
    )


def absorbed_values(config: ModelConfig, layers: int) -> int:
    """Values of the copies that vLLM makes of `kv_b_proj` in the model's dtype, to decode in the latent space."""
    if not config.get("kv_lora_rank"):
        return 0
    H = config.int_of("num_attention_heads")
    return (
        layers * config.int_of("kv_lora_rank") * H * (config.int_of("qk_nope_head_dim") + config.int_of("v_head_dim"))
    )


def hidden_size(config: ModelConfig) -> int:
    """D."""
    return config.int_of("hidden_size", "d_model")


def heads(config: ModelConfig) -> tuple[int, int, int]:
    """(H, G, d)."""
    H = config.int_of("num_attention_heads", "n_heads")
    G = config.get("num_key_value_heads") or config.get("attn_config.kv_n_heads") or H
    d = config.get("head_dim") or hidden_size(config) // H
    return H, int(G), int(d)


def _windows(config: ModelConfig, layers: int) -> list[int | None]:
    """The window of each layer, None for full attention."""
    types = config.get("layer_types")
    chunk, window = config.get("attention_chunk_size"), config.get("sliding_window")
    if types is not None:
        sizes = {"full_attention": None, "sliding_attention": window, "chunked_attention": chunk}
        strange = set(types) - set(sizes)
        if strange:
            raise _unknown(config, f"layer_types {sorted(strange)}")
        return [sizes[name] for name in types]
    if config.model_type == "gpt_oss" and window:
        return [window if layer % 2 == 0 else None for layer in range(layers)]
    if config.model_type in ("llama4", "llama4_text") and chunk:
        rope = config.get("no_rope_layers")
        return [chunk if (rope[n] if rope else (n + 1) % 4) else None for n in range(layers)]
    if window and config.get("use_sliding_window", config.model_type == "mixtral"):
        return [window] * layers
    return [None] * layers


def _latent_tensors(config: ModelConfig, layers: int, D: int) -> list[Tensors]:
    H, rank = config.int_of("num_attention_heads"), config.int_of("kv_lora_rank")
    nope, rope = config.int_of("qk_nope_head_dim"), config.int_of("qk_rope_head_dim")
    v, q_rank = config.int_of("v_head_dim"), config.get("q_lora_rank")
    found = [
        _linear(rank + rope, D, layers),
        _vector(rank, layers),
        _linear(H * (nope + v), rank, layers),
        _linear(D, H * v, layers),
    ]
    if q_rank:
        found += [_linear(q_rank, D, layers), _vector(q_rank, layers), _linear(H * (nope + rope), q_rank, layers)]
    else:
        found.append(_linear(H * (nope + rope), D, layers))
    if config.get("index_head_dim"):
        index, index_heads, with_index = _index(config, layers)
        found += [
            _linear(index_heads * index, int(q_rank), with_index),
            _linear(index, D, with_index),
            _vector(index, 2 * with_index),
            Tensors("attention", "router", index_heads, D, with_index),
        ]
    return found


def _latent_groups(config: ModelConfig, layers: int) -> tuple[AttentionGroup, ...]:
    H, rank, rope = (config.int_of(key) for key in ("num_attention_heads", "kv_lora_rank", "qk_rope_head_dim"))
    flops = 2.0 * H * (2 * rank + rope)
    prefill = 2.0 * H * (config.int_of("qk_nope_head_dim") + rope + config.int_of("v_head_dim"))
    if not config.get("index_head_dim"):
        return (AttentionGroup("mla", layers, rank + rope, flops, prefill, heads=H),)
    index, _, with_index = _index(config, layers)
    topk = config.int_of("index_topk") if config.get("index_topk") else 2048
    index_bytes = index + 4 * -(-index // _INDEX_GROUP)
    each = AttentionGroup("mla", layers - with_index, rank + rope, flops, prefill, reads_at_most=topk, heads=H)
    found = [replace(each, kind="mla+indexer", layers=with_index, index_bytes=index_bytes)]
    if with_index < layers:
        found.append(each)
    return tuple(found)


def _index(config: ModelConfig, layers: int) -> tuple[int, int, int]:
    """(size of an indexer's head, its heads, layers with one of their own); others use that of a layer before."""
    types = config.get("indexer_types")
    if types is None:
        every, offset = max(config.get("index_topk_freq", 1), 1), config.get("index_skip_topk_offset", 2)
        full = sum(max(layer - offset + 1, 0) % every == 0 for layer in range(layers))
    else:
        full = sum(name == "full" for name in types)
    return config.int_of("index_head_dim"), config.int_of("index_n_heads"), full


def _linear(rows: int, columns: int, count: int) -> Tensors:
    return Tensors("attention", "router", rows, columns, count, "linear")


def _vector(values: int, count: int) -> Tensors:
    return Tensors("attention", "router", values, 1, count)


def _unknown(config: ModelConfig, what: str) -> CheckpointError:
    return CheckpointError(
        f"{config.path}: {config.model_type} has {what}; sizing knows MHA, GQA, MQA, MLA and sliding windows"
    )
