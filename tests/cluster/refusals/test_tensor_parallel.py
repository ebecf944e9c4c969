"""How many workers may divide a model's attention, and how long they may wait for a shard, by vLLM's own rules."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.refusals.tensor_parallel import LONGEST_STEP, dispatch_problem, heads_problem


def tensor(workers: Any) -> dict[str, Any]:
    return {"tensor_parallel_size": workers}


@pytest.mark.parametrize("heads", [8, 12, 28])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_heads_and_kv_heads_are_divided_as_vllms_layers_do(heads: int, kv_heads: int) -> None:
    """Its rules: `ModelConfig.verify_with_parallel_config` for heads, `QKVParallelLinear` for KV heads."""
    config = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    fitting = [n for n in range(1, heads + 1) if heads % n == 0 and max(n, kv_heads) % min(n, kv_heads) == 0]
    assert [n for n in range(1, heads + 1) if heads_problem(config, tensor(n)) is None] == fitting
    refused = heads_problem(config, tensor(heads + 1))
    assert refused is not None
    told = f"tensor_parallel_size is {heads + 1}, but the model's {heads} heads (num_attention_heads in its"
    assert refused.startswith(told)


def test_the_refusal_names_what_fits() -> None:
    config = {"num_attention_heads": 12, "num_key_value_heads": 4}
    refused = heads_problem(config, tensor(3))
    assert refused is not None
    assert "4 heads (num_key_value_heads in its config.json)" in refused
    assert refused.endswith("expected one of 1, 2, 4, 12")
    assert heads_problem({"text_config": config}, tensor(3)) == refused


def test_a_latent_cache_has_no_heads_to_divide() -> None:
    config = {"num_attention_heads": 12, "num_key_value_heads": 4, "kv_lora_rank": 512}
    assert heads_problem(config, tensor(3)) is None


@pytest.mark.parametrize("options", [{}, tensor(1), tensor("3"), {**tensor(3), "hf_overrides": {"x": 1}}])
def test_what_is_not_known_here_is_not_refused(options: dict[str, Any]) -> None:
    assert heads_problem({"num_attention_heads": 4, "num_key_value_heads": 4}, options) is None
    assert heads_problem({}, tensor(3)) is None


def test_a_dispatch_is_given_up_before_vllm_gives_up_the_engine() -> None:
    vllm_envs = pytest.importorskip("vllm.envs", reason="the rule is vLLM's")
    step_ms = 1000 * vllm_envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS
    assert dispatch_problem(step_ms - 1, 2, {}) is None
    refused = dispatch_problem(step_ms, 2, {})
    assert refused is not None
    assert refused.startswith("dispatch_ms is 300000, but vLLM gives up an engine of several workers whose step takes")
    assert dispatch_problem(step_ms, 1, {}) is None
    assert dispatch_problem(step_ms, 2, {LONGEST_STEP: "301"}) is None
    assert dispatch_problem(step_ms, 2, {LONGEST_STEP: "soon"}) is None
