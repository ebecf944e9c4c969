"""Reads the facts about routed experts from config.json, in any family's spelling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experts.checkpoint.errors import CheckpointError
from experts.checkpoint.quantization.from_config import scheme_of, spares_attention
from experts.checkpoint.quantization.scheme import Scheme
from experts.checkpoint.sources.base import CONFIG_NAME, QUANTIZATION_NAME

# Beside the facts about experts: a router and a shard whose files differ in one of these serve different models.
AGREED_KEYS = (
    *("num_hidden_layers", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"),
    *("intermediate_size", "norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group", "scoring_func"),
)


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

    values: dict[str, Any]

    def __init__(self, folder: Path) -> None:
        path = folder / CONFIG_NAME
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder; expected a downloaded Hugging Face checkpoint")
        self._take(read_json_object(path, "a downloaded Hugging Face checkpoint"), path)
        beside = folder / QUANTIZATION_NAME
        if self._quantization is None and beside.is_file():
            settings = read_json_object(beside, "the quantization of ModelOpt")
            self.values = {**self.values, "quantization_config": {"quant_method": "modelopt", **settings}}

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
        self.values = {**whole, **nested} if isinstance(nested, dict) else whole
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

    @property
    def _quantization(self) -> Any:
        # At the top level or next to the language model: both occur.
        return self.get("quantization_config") or self.get("compression_config")

    def scheme(self) -> Scheme | None:
        """How expert weights are stored, None for plain floats. CheckpointError names an unsupported quantization."""
        settings = self._quantization
        return None if settings is None else scheme_of(settings, self.path)

    @property
    def quantizes_dense(self) -> bool:
        """Whether attention and dense layers are quantized too, as far as config.json tells."""
        settings = self._quantization
        return settings is not None and not spares_attention(settings)
