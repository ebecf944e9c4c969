"""The longest context that vLLM gives a model, from its config.json: vLLM's `_get_and_verify_max_len` without vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

ALLOW_LONGER = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"  # vLLM's environment variable
# Where config.json says it, and variants of RoPE whose max_position_embeddings include their factor. From vLLM.
_KEYS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length"),
    *("max_target_positions", "max_sequence_length", "max_seq_length", "seq_len"),
)
_SCALED_ALREADY = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")


def longest_context(config: dict[str, Any], disable_sliding_window: bool = False) -> tuple[float, str] | None:
    """(tokens, the key that says so) for the values of a config.json; None if it does not say.

    Where a config.json leaves a key out, vLLM has the default of the model's class in transformers; here it is unknown.
    """
    nested = config.get("text_config")
    values = {**config, **nested} if isinstance(nested, dict) else config
    found = [(values[key], key) for key in _KEYS if _is_number(values.get(key))]
    if not found:
        return None
    length, key = min(found)
    if _is_number(values.get("model_max_length")):
        length, key = values["model_max_length"], "model_max_length"
    window = values.get("sliding_window")
    if disable_sliding_window and _is_number(window) and window < length:
        length, key = window, "sliding_window"
    factor = 1.0
    if "gemma3" not in str(values.get("model_type")):
        for rope in _rope_parameters(values):
            if rope.get("rope_type", rope.get("type")) not in _SCALED_ALREADY:
                factor = rope.get("factor", factor)
    return length * (factor if _is_number(factor) else 1.0), key


def context_problem(config: dict[str, Any], options: dict[str, Any], env: Mapping[str, str]) -> str | None:
    """Why vLLM would refuse the engine option max_model_len for a model; None if it takes it.

    Args:
        config: values of the model's config.json.
        options: the engine's options.
        env: environment of the engine.
    """
    asked = options.get("max_model_len")
    if not _is_number(asked) or asked == -1 or options.get("hf_overrides"):
        return None
    if env.get(ALLOW_LONGER, "0").strip().lower() in ("1", "true"):
        return None
    found = longest_context(config, bool(options.get("disable_sliding_window")))
    if found is None or asked <= found[0]:
        return None
    length, key = found
    return (
        f"max_model_len is {asked}, more than the model's {length:g} ({key} in its config.json): lower it, or set "
        f"{ALLOW_LONGER} to 1 in routers.env_vars if the model is known to bear it"
    )


def _rope_parameters(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """RoPE's settings, one for each type of layer where they differ by it. Older files call them rope_scaling."""
    rope = values.get("rope_parameters") or values.get("rope_scaling")
    if isinstance(rope, dict):
        nested = [part for part in rope.values() if isinstance(part, dict)]
        yield from nested or [rope]


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
