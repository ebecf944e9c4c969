"""The longest context of a model against vLLM's own rule, at the limit and one token above it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experts.vllm_plugin.context_length import ALLOW_LONGER, context_problem, longest_context
from tests.support.zygote.engine_zygote import Zygote

TINY = json.loads((Path(__file__).parents[3] / "examples" / "tiny-moe" / "config.json").read_text())

# (what differs in config.json, engine options, the longest context)
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "plain": ({}, {}, 2048),
    "linear": ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, {}, 4096),
    "dynamic": ({"rope_parameters": {"rope_type": "dynamic", "factor": 1.5, "rope_theta": 1e4}}, {}, 3072),
    "yarn": (
        {
            "rope_parameters": {
                **{"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4},
                "original_max_position_embeddings": 512,
            }
        },
        {},
        2048,
    ),
    "older": (
        {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {},
        8192,
    ),
    "model_max_length": ({"model_max_length": 1024}, {}, 1024),
    "window kept": ({"sliding_window": 256, "use_sliding_window": True, "max_window_layers": 0}, {}, 2048),
    "window off": (
        {"sliding_window": 256, "use_sliding_window": True, "max_window_layers": 0},
        {"disable_sliding_window": True},
        256,
    ),
}


@pytest.fixture(scope="module")
def answers(vllm_zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    folder = tmp_path_factory.mktemp("models")
    cases: dict[str, dict[str, Any]] = {}
    for name, (changes, options, longest) in MODELS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({**TINY, **changes}))
        for length in (longest, longest + 1):
            cases[f"{name} {length}"] = {"folder": name, "max_model_len": length, **options}
    job = vllm_zygote.start("engine_configs", model=str(folder), cases=cases)
    answers: dict[str, str | None] = vllm_zygote.wait(job, "answers")
    return answers


@pytest.mark.parametrize("name", MODELS)
def test_the_limit_is_vllms(answers: dict[str, str | None], name: str) -> None:
    changes, options, longest = MODELS[name]
    assert answers[f"{name} {longest}"] is None
    refused = answers[f"{name} {longest + 1}"]
    assert refused is not None
    assert "is greater than the derived max_model_len" in refused
    config = {**TINY, **changes}
    assert context_problem(config, {"max_model_len": longest, **options}, {}) is None
    line = context_problem(config, {"max_model_len": longest + 1, **options}, {})
    assert line is not None
    assert line.startswith(f"max_model_len is {longest + 1}, more than the model's {longest} (")


def test_what_cannot_be_told_is_not_refused() -> None:
    long = {"max_model_len": 10**6}
    assert longest_context({"model_type": "moe"}) is None
    assert context_problem({"model_type": "moe"}, long, {}) is None
    assert context_problem(TINY, {}, {}) is None
    assert context_problem(TINY, {"max_model_len": -1}, {}) is None
    assert context_problem(TINY, {**long, "hf_overrides": {"max_position_embeddings": 10**6}}, {}) is None
    assert context_problem(TINY, long, {ALLOW_LONGER: "1"}) is None
    assert context_problem(TINY, long, {ALLOW_LONGER: "0"}) is not None


def test_the_language_model_inside_a_multimodal_one_counts() -> None:
    assert longest_context({"max_position_embeddings": 64, "text_config": TINY}) == (2048, "max_position_embeddings")
    rope = {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}, "sliding_attention": {}}}
    assert longest_context({**TINY, **rope}) == (4096, "max_position_embeddings")
