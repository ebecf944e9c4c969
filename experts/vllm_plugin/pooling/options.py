"""Whether an engine will pool (embeddings, scores, classes) instead of generating, told from its options and the
model's files without importing vllm, and what does not go along with that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Ends of architectures' names by which vLLM takes a model as one that pools, and those that come before them.
_GENERATES = ("ForCausalLM", "ForConditionalGeneration", "ChatModel", "LMHeadModel")
_POOLS = ("ForTextEncoding", "ForSequenceClassification", "ForTokenClassification", "ForRewardModeling", "Model")

# Engine options that an engine which pools cannot have, and why.
NOT_WITH_POOLING = {
    "speculative_config": "it guesses tokens, and an engine that pools generates none",
    "kv_transfer_config": "there is nothing to decode elsewhere",
    "enable_lora": "nobody has tried adapters on an engine that pools",
    "io_processor_plugin": "what a plug-in answers cannot be told from a request that lacked experts",
}


def pools(options: dict[str, Any], values: dict[str, Any] | None = None, folder: Path | None = None) -> bool:
    """Whether an engine with these options pools.

    `values` are those of the model's config.json and `folder` is where that is; without them options alone tell.
    """
    runner, convert = options.get("runner", "auto"), options.get("convert", "auto")
    if runner != "auto" or convert in ("embed", "classify"):
        return bool(runner == "pooling" or (runner == "auto" and convert in ("embed", "classify")))
    overrides = options.get("hf_overrides")
    overrides = overrides if isinstance(overrides, dict) else {}
    names = overrides.get("architectures", (values or {}).get("architectures"))
    return _is_of_sentences(folder) or any(map(_name_pools, names if isinstance(names, list) else ()))


def refused_with_pooling(options: dict[str, Any]) -> Iterator[str]:
    """One line for each option of an engine that pools which does not go along with that."""
    for key, why in NOT_WITH_POOLING.items():
        if options.get(key):
            yield f"{key} does not go with an engine that pools: {why}"


def _name_pools(name: Any) -> bool:
    return isinstance(name, str) and not name.endswith(_GENERATES) and name.endswith(_POOLS)


def _is_of_sentences(folder: Path | None) -> bool:
    """Whether a folder is a model of Sentence Transformers, which lists how it pools."""
    path = None if folder is None else folder / "modules.json"
    if path is None or not path.exists():
        return False
    try:
        modules = json.loads(path.read_text())
    except ValueError:
        return False
    found = [each for each in modules if isinstance(each, dict)] if isinstance(modules, list) else []
    return any(str(each.get("type")).endswith(".Pooling") for each in found)
