"""Reads the facts about routed experts out of config.json, whichever of its spellings a family uses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experts.checkpoint.errors import CheckpointError

FP8_BLOCK = 128


class ModelConfig:
    """config.json with the language model's part on top: a multimodal model nests it under `text_config`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "config.json"
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder; expected a downloaded Hugging Face checkpoint")
        try:
            whole = json.loads(self.path.read_text())
        except FileNotFoundError:
            raise CheckpointError(f"{self.path}: the file is missing") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: cannot be read as JSON: {error}") from error
        if not isinstance(whole, dict):
            raise CheckpointError(f"{self.path}: expected a JSON object, found {type(whole).__name__}")
        nested = whole.get("text_config")
        self.values: dict[str, Any] = {**whole, **nested} if isinstance(nested, dict) else whole
        self.model_type = self.str_of("model_type")

    def get(self, key: str, default: Any = None) -> Any:
        """The value at a key; a dot descends, as in `ffn_config.moe_top_k`. None counts as absent."""
        value: Any = self.values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return default if value is None else value

    def int_of(self, *keys: str) -> int:
        """The first of the keys that is there, a positive integer."""
        for key in keys:
            value = self.get(key)
            if value is not None:
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise CheckpointError(f"{self.path}: {key} is {value!r}, expected a positive integer")
                return value
        raise CheckpointError(f"{self.path}: none of {', '.join(keys)} is given")

    def str_of(self, key: str, default: str | None = None) -> str:
        """The string at a key, or the default."""
        value = self.get(key, default)
        if not isinstance(value, str):
            raise CheckpointError(f"{self.path}: {key} is {value!r}, expected a string")
        return value

    def quantization(self) -> str | None:
        """How expert weights are stored: None, "fp8_block" or "mxfp4". Anything else is refused by its name."""
        # Top level or beside the language model: both are met in the wild.
        settings = self.get("quantization_config") or self.get("compression_config")
        if settings is None:
            return None
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        if method == "mxfp4":
            return "mxfp4"
        if method == "fp8":
            block = settings.get("weight_block_size")
            if block == [FP8_BLOCK, FP8_BLOCK]:
                return "fp8_block"
            method = f"fp8 with weight_block_size {block}"
        raise CheckpointError(
            f"{self.path}: quantization {method} is not supported; expected none, mxfp4, or fp8 with "
            f"weight_block_size [{FP8_BLOCK}, {FP8_BLOCK}]"
        )
