"""Reads the facts about routed experts from config.json, in any family's spelling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experts.checkpoint.errors import CheckpointError
from experts.checkpoint.weight_format import MXFP4_BLOCK, WeightFormat

FP8_BLOCK = 128
# Beside the facts about experts: a router and a shard whose files differ in one of these serve different models.
AGREED_KEYS = (
    *("num_hidden_layers", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"),
    *("intermediate_size", "norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group", "scoring_func"),
)
_INT4_SCHEME = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}


def read_json_object(path: Path, expected: str) -> dict[str, Any]:
    """The values in a JSON file of `expected`. CheckpointError names a file that is missing or holds no object."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing; expected {expected}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


class ModelConfig:
    """config.json, with the values of `text_config` on top: multimodal models nest their language model there."""

    def __init__(self, folder: Path) -> None:
        path = folder / "config.json"
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder; expected a downloaded Hugging Face checkpoint")
        self._take(read_json_object(path, "a downloaded Hugging Face checkpoint"), path)

    @classmethod
    def of_values(cls, whole: Any, path: Path) -> ModelConfig:
        """The configuration from values that were read already; `path` is what errors name."""
        config = cls.__new__(cls)
        config._take(whole, path)
        return config

    def _take(self, whole: Any, path: Path) -> None:
        self.path = path
        if not isinstance(whole, dict):
            raise CheckpointError(f"{self.path}: expected a JSON object, found {type(whole).__name__}")
        nested = whole.get("text_config")
        self.values: dict[str, Any] = {**whole, **nested} if isinstance(nested, dict) else whole
        self.model_type = self.str_of("model_type")

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key; a dot descends, as in `ffn_config.moe_top_k`. null counts as absent."""
        value: Any = self.values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return default if value is None else value

    def int_of(self, *keys: str) -> int:
        """The value of the first key that is present, a positive integer; or a list of equal ones, for each layer."""
        for key in keys:
            value = self.get(key)
            if value is not None:
                if isinstance(value, list) and value and value.count(value[0]) == len(value):
                    value = value[0]
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise CheckpointError(f"{self.path}: {key} is {value!r}, expected a positive integer")
                return value
        raise CheckpointError(f"{self.path}: expected one of {', '.join(keys)}, found none")

    def str_of(self, key: str, default: str | None = None) -> str:
        """The string value of a key, or the default."""
        value = self.get(key, default)
        if not isinstance(value, str):
            raise CheckpointError(f"{self.path}: {key} is {value!r}, expected a string")
        return value

    def weight_format(self) -> WeightFormat | None:
        """How expert weights are stored, None for plain floats. CheckpointError names an unsupported quantization."""
        # At the top level or next to the language model: both occur.
        settings = self.get("quantization_config") or self.get("compression_config")
        if settings is None:
            return None
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        if method == "mxfp4":
            return WeightFormat("mxfp4", MXFP4_BLOCK)
        if method == "fp8":
            block = settings.get("weight_block_size")
            if block == [FP8_BLOCK, FP8_BLOCK]:
                return WeightFormat("fp8_block", FP8_BLOCK)
            method = f"fp8 with weight_block_size {block}"
        if method == "compressed-tensors":
            return self._compressed(settings)
        raise self._unsupported(f"{method} is not supported")

    def _compressed(self, settings: dict[str, Any]) -> WeightFormat:
        """compressed-tensors; only symmetric INT4 in groups of a row is supported (Kimi-K2-Thinking)."""
        groups = settings.get("config_groups")
        schemes = list(groups.values()) if isinstance(groups, dict) else []
        weights: dict[str, Any] = (schemes[0].get("weights") or {}) if len(schemes) == 1 else {}
        found = {"format": settings.get("format")} | {key: weights.get(key) for key in _INT4_SCHEME}
        expected = {"format": "pack-quantized"} | _INT4_SCHEME
        if found != expected or weights.get("actorder") in ("group", "dynamic"):
            problem = self._unsupported("compressed-tensors is not supported")
            raise CheckpointError(
                f"{problem}; found {len(schemes)} groups of settings, {found}, actorder {weights.get('actorder')}"
            )
        try:
            return WeightFormat("int4", int(weights.get("group_size") or 0))
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def _unsupported(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: quantization {what}; expected none, mxfp4, fp8 with weight_block_size "
            f"[{FP8_BLOCK}, {FP8_BLOCK}], or compressed-tensors pack-quantized with one group of {_INT4_SCHEME}"
        )
