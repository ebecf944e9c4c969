"""Small random checkpoints of the supported families, for tests: float32, no tokenizer, sizes that vLLM runs on a CPU.

Weights are drawn so that comparing two engines is meaningful: logits are far apart, every layer's routed experts change
the result, correction and projection biases are not zero. Serve them with `skip_tokenizer_init=True` and prompts of
token ids below `VOCAB`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCAB = 256
PARITY_FAMILIES = (
    "qwen3_moe",
    "qwen2_moe",
    "mixtral",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
# vLLM's CPU build runs multi-head latent attention only with the head sizes of the real models.
_MLA: dict[str, Any] = {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 512,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
_DEEPSEEK: dict[str, Any] = {
    **_COMMON,
    **_MLA,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    # As in the real models. With plain rotary embeddings, vLLM's CPU build differs from transformers at position 1.
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 128,
    },
}
# Few of the expert counts are multiples of 2 or 3 shards, and few widths are powers of two.
_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        **_COMMON,
        "head_dim": 32,
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    },
    "qwen2_moe": {
        **_COMMON,
        "num_attention_heads": 2,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 80,
        "num_experts": 9,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
    },
    "mixtral": {
        **_COMMON,
        "head_dim": 32,
        "intermediate_size": 64,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "olmoe": {
        **_COMMON,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 40,
        "num_experts": 10,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
    },
    "deepseek_v2": {**_DEEPSEEK, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5},
    "deepseek_v3": {
        **_DEEPSEEK,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.0,
        "num_nextn_predict_layers": 0,
    },
    "glm4_moe": {
        **_COMMON,
        "num_hidden_layers": 3,
        "head_dim": 32,
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "n_routed_experts": 7,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "use_qk_norm": True,
        "num_nextn_predict_layers": 0,
    },
    "gpt_oss": {
        **_COMMON,
        "head_dim": 64,
        "num_attention_heads": 2,
        "intermediate_size": 96,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 128,
        },
    },
    # The families below have no parity test; names and arithmetic are compared with transformers' modules.
    "minimax_m2": {
        **_COMMON,
        "head_dim": 32,
        "intermediate_size": 48,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
    },
    "glm_moe_dsa": {
        **{key: value for key, value in _DEEPSEEK.items() if key != "rope_parameters"},
        "index_n_heads": 2,
        "index_head_dim": 64,
        "num_nextn_predict_layers": 0,
    },
    "llama4_text": {
        **_COMMON,
        "head_dim": 32,
        "intermediate_size": 48,
        "intermediate_size_mlp": 96,
        "num_local_experts": 5,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
    },
    "dbrx": {
        "vocab_size": VOCAB,
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "tie_word_embeddings": False,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": 5, "moe_top_k": 2},
    },
}


def make_checkpoint(
    family: str, path: str | Path, *, seed: int = 0, zero_experts: bool = False, **overrides: Any
) -> Path:
    """Write a checkpoint of `family` (a key of transformers' CONFIG_MAPPING listed here) and return its folder.

    `overrides` go into the configuration. `zero_experts` writes zeros for the routed experts, so that a test can see
    whether they matter. Equal arguments give equal bytes.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    if family not in _CONFIGS:
        raise ValueError(f"family is {family!r}, expected one of {sorted(_CONFIGS)}")
    config = CONFIG_MAPPING[family](**{**_CONFIGS[family], **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            _draw(name, tensor, generator, zero_experts)
    model.save_pretrained(path)
    return Path(path)


def _draw(name: str, tensor: torch.Tensor, generator: torch.Generator, zero_experts: bool) -> None:
    def normal(std: float, mean: float = 0.0) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)

    if ".experts." in name:
        # Right within a factor of two, transposed or not; biases are as large as a row's output.
        std = 0.5 if name.endswith("_bias") else 2.0 / tensor.shape[-1] ** 0.5
        normal(0.0 if zero_experts else std)
    elif name.endswith("e_score_correction_bias"):
        normal(0.2)
    elif "inv_freq" in name:
        return
    elif tensor.dim() == 1:
        normal(0.1, mean=1.0 if "norm" in name else 0.0)
    elif "embed_tokens" in name:
        normal(1.0)
    elif "lm_head" in name:
        normal(4.0 / tensor.shape[-1] ** 0.5)
    else:
        normal(1.0 / tensor.shape[-1] ** 0.5)
