"""What an engine of several workers cannot do: told from config.json and the environment, without vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LONGEST_STEP = "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"  # vLLM's environment variable, and its default
_LONGEST_STEP_S = 300.0


def dispatch_problem(dispatch_ms: float, workers: int, env: Mapping[str, str]) -> str | None:
    """Why an engine of `workers` would be given up while it waits for a shard; None if it is not.

    `env`: the environment of the engine. `experts.vllm_plugin.refusals` refuses the same at start, by vLLM's own value.
    """
    try:
        step_s = float(env.get(LONGEST_STEP, _LONGEST_STEP_S))
    except ValueError:
        return None  # vLLM says so
    if workers == 1 or dispatch_ms < 1000 * step_s:
        return None
    return (
        f"dispatch_ms is {dispatch_ms:g}, but vLLM gives up an engine of several workers whose step takes {step_s:g} "
        f"s: lower it, or raise {LONGEST_STEP} in routers.env_vars"
    )


def heads_problem(config: dict[str, Any], options: dict[str, Any]) -> str | None:
    """Why vLLM would refuse the engine option tensor_parallel_size for a model; None if it takes it.

    Each worker gets as many attention heads. KV heads are divided likewise; where there are fewer than workers, as many
    workers hold each of them. MLA's cache has no heads, so every worker holds all of it.

    Args:
        config: values of the model's config.json.
        options: the engine's options.
    """
    workers = options.get("tensor_parallel_size", 1)
    if type(workers) is not int or workers <= 1 or options.get("hf_overrides"):
        return None
    nested = config.get("text_config")
    values = {**config, **nested} if isinstance(nested, dict) else config
    heads, kv_heads = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if type(heads) is int and heads % workers:
        return _refusal(workers, "num_attention_heads", heads, [n for n in range(1, heads + 1) if heads % n == 0])
    latent = values.get("kv_lora_rank") is not None
    if type(kv_heads) is int and kv_heads > 0 and not latent and kv_heads % workers and workers % kv_heads:
        top = heads if type(heads) is int else kv_heads
        fitting = [n for n in range(1, top + 1) if top % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
        return _refusal(workers, "num_key_value_heads", kv_heads, fitting)
    return None


def _refusal(workers: int, key: str, heads: int, fitting: list[int]) -> str:
    return (
        f"tensor_parallel_size is {workers}, but the model's {heads} heads ({key} in its config.json) cannot be "
        f"divided among so many workers: expected one of {', '.join(map(str, fitting))}"
    )
