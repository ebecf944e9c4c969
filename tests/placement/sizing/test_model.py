"""KV bytes against vLLM's own cache specifications, and bytes of stored formats against arrays counted by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from experts.checkpoint.quantization.blocks import Fp8Block, Mxfp4
from experts.checkpoint.quantization.integers import PackedIntegers
from experts.checkpoint.sizes.known_models import known_models
from placement.sizing.model import AttentionGroup, ModelFacts, Stored, Tensors


def known(name: str) -> ModelFacts:
    return known_models()[name].facts()


def vllm_spec(name: str, facts: ModelFacts, group: AttentionGroup, block: int) -> Any:
    """The specification that vLLM's attention layers give, from the sizes in config.json."""
    torch = pytest.importorskip("torch")
    interface = pytest.importorskip("vllm.v1.kv_cache_interface")
    config = known_models()[name].config
    if "kv_lora_rank" in config:
        size = config["kv_lora_rank"] + config["qk_rope_head_dim"]
        return interface.MLAAttentionSpec(block_size=block, num_kv_heads=1, head_size=size, dtype=torch.bfloat16)
    heads = config.get("num_key_value_heads") or config["attn_config"]["kv_n_heads"]
    size = config.get("head_dim") or facts.hidden_size // config.get("num_attention_heads", config.get("n_heads"))
    common = {"block_size": block, "num_kv_heads": heads, "head_size": size, "dtype": torch.bfloat16}
    if group.window is None:
        return interface.FullAttentionSpec(**common)
    return interface.SlidingWindowSpec(**common, sliding_window=group.window, dcp_sharded=False)


@pytest.mark.parametrize("name", [name for name in known_models() if not name.startswith("glm-5")])
@pytest.mark.parametrize(("tokens", "in_flight", "block"), [(1, 512, 16), (2300, 512, 16), (4001, 2048, 64)])
def test_a_sequence_takes_what_vllm_gives_it(name: str, tokens: int, in_flight: int, block: int) -> None:
    facts = known(name)
    config = SimpleNamespace(
        max_in_flight_tokens=in_flight,
        model_config=SimpleNamespace(max_model_len=tokens),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    )
    expected = 0
    for group in facts.attention:
        spec = vllm_spec(name, facts, group, block)
        whole = -(-tokens // block) * spec.page_size_bytes
        # vLLM admits up to the specification's blocks; a short sequence takes fewer.
        expected += group.layers * min(whole, spec.max_memory_usage_bytes(config))
    assert facts.kv_sequence_bytes(tokens, block=block, in_flight=in_flight) == expected


def test_an_indexer_has_a_cache_of_its_own() -> None:
    """DeepSeek's sparse attention: 128 fp8 values and a float32 scale, vLLM's head of 132 bytes."""
    torch = pytest.importorskip("torch")
    interface = pytest.importorskip("vllm.v1.kv_cache_interface")
    index = interface.MLAAttentionSpec(block_size=1, num_kv_heads=1, head_size=132, dtype=torch.uint8)
    latent = interface.MLAAttentionSpec(block_size=1, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    assert known("glm-5").kv_token_bytes() == 78 * (latent.page_size_bytes + index.page_size_bytes)


def test_a_window_holds_no_more_than_its_tokens_and_those_in_flight() -> None:
    facts = known("gpt-oss-20b")
    long, longer = (facts.kv_sequence_bytes(tokens, in_flight=512) for tokens in (32_000, 64_000))
    full = next(group for group in facts.attention if group.window is None)
    assert longer - long == 32_000 * full.layers * full.token_bytes(2), "only full attention grows"


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (Stored(), 2 * 300 * 256),
        (Stored(float_bytes=4), 4 * 300 * 256),
        (Stored(Fp8Block()), 300 * 256 + 4 * 3 * 2),
        (Stored(Mxfp4()), 300 * 256 // 2 + 300 * 8),
        (Stored(PackedIntegers(4, 64)), 300 * 256 // 2 + 2 * 300 * 4 + 8),
    ],
)
def test_a_matrix_takes_its_values_and_scales(stored: Stored, expected: int) -> None:
    assert Tensors("x", "experts", 300, 256, 5, "expert").nbytes(stored) == 5 * expected


def test_quantization_spares_what_it_does_not_name() -> None:
    linear, gate = Tensors("x", "router", 256, 256, kind="linear"), Tensors("gate", "router", 8, 256)
    assert linear.nbytes(Stored(Mxfp4())) == linear.nbytes(Stored(PackedIntegers(4, 32))) == 2 * 256 * 256
    assert linear.nbytes(Stored(Fp8Block(), dense=True)) == 256 * 256 + 4 * 4
    assert gate.nbytes(Stored(Fp8Block(), dense=True)) == 2 * 8 * 256
