"""Which engines pool, told from options and the model's files, against what vLLM itself decides of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experts.vllm_plugin.pooling.options import pools, refused_with_pooling
from tests.support.zygote.engine_zygote import Zygote

TINY = Path(__file__).parents[4] / "examples" / "tiny-moe"
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
# Name: options of an engine, architecture in config.json, modules.json, and whether the engine pools.
CASES: dict[str, tuple[dict[str, Any], str, list[Any] | None, bool]] = {
    "plain": ({}, "Qwen3MoeForCausalLM", None, False),
    "runner": ({"runner": "pooling"}, "Qwen3MoeForCausalLM", None, True),
    "embed": ({"convert": "embed"}, "Qwen3MoeForCausalLM", None, True),
    "classify": ({"convert": "classify"}, "Qwen3MoeForCausalLM", None, True),
    "none": ({"convert": "none"}, "Qwen3MoeForCausalLM", None, False),
    "classifier": ({}, "Qwen3MoeForSequenceClassification", None, True),
    "bare": ({}, "Qwen3MoeModel", None, True),
    "overridden": ({"hf_overrides": {"architectures": ["Qwen3MoeModel"]}}, "Qwen3MoeForCausalLM", None, True),
    "sentences": ({}, "Qwen3MoeForCausalLM", MODULES, True),
    "generator": ({"runner": "generate"}, "Qwen3MoeForCausalLM", MODULES, False),
    "other modules": ({}, "Qwen3MoeForCausalLM", MODULES[:1], False),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model's files for each case, without weights."""
    values = json.loads((TINY / "config.json").read_text())
    found = {}
    for name, (_, architecture, modules, _) in CASES.items():
        folder = found[name] = tmp_path_factory.mktemp("model")
        (folder / "config.json").write_text(json.dumps({**values, "architectures": [architecture]}))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).symlink_to(TINY / file)
        if modules is not None:
            (folder / "modules.json").write_text(json.dumps(modules))
            (folder / "1_Pooling").mkdir()
            (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    return found


def test_it_is_what_vllm_decides(vllm_zygote: Zygote, folders: dict[str, Path]) -> None:
    cases = {name: (str(folders[name]), options) for name, (options, *_) in CASES.items()}
    job = vllm_zygote.start("runner_types", cases=cases)
    expected = vllm_zygote.wait(job, "runners")
    assert expected == {name: "pooling" if does else "generate" for name, (*_, does) in CASES.items()}
    found = {}
    for name, (options, *_) in CASES.items():
        values = json.loads((folders[name] / "config.json").read_text())
        found[name] = "pooling" if pools(options, values, folders[name]) else "generate"
    assert found == expected


def test_without_the_models_files_options_alone_tell() -> None:
    assert pools({"runner": "pooling"})
    assert not pools({})
    assert not pools({}, {"architectures": "Qwen3MoeModel"}), "no list, which is told elsewhere"


def test_files_that_cannot_be_read_say_nothing(tmp_path: Path) -> None:
    for text in ("{", "{}", '["x"]'):
        (tmp_path / "modules.json").write_text(text)
        assert not pools({}, {}, tmp_path)


def test_what_does_not_go_along_is_named_with_the_reason() -> None:
    options = {"speculative_config": {"method": "ngram"}, "kv_transfer_config": {"kv_role": "kv_both"}, "seed": 0}
    assert list(refused_with_pooling(options)) == [
        "speculative_config does not go with an engine that pools: it guesses tokens, and an engine that pools "
        "generates none",
        "kv_transfer_config does not go with an engine that pools: there is nothing to decode elsewhere",
    ]
    assert list(refused_with_pooling({"enable_lora": False, "speculative_config": None})) == []
