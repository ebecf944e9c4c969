"""What is refused of routers whose engine pools, by options or by the model's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config.apps import LLMAppConfig
from cluster.config.parse import parse
from cluster.config.serve_file import MeshConfig
from cluster.refusals.applications import llm_problems
from experts.vllm_plugin.pooling.options import pools
from tests.support.serve.shipped_configs import CONFIGS, serve_config

CONFIG = yaml.safe_load((Path(__file__).parents[3] / "configs" / "tiny-cpu.yaml").read_text())
TINY = Path(__file__).parents[3] / "examples" / "tiny-moe"
LORA = {"dynamic_lora_loading_path": str(TINY.parent / "tiny-adapters")}
POOLS: dict[str, Any] = {"prefill": {}, "decode": {}}


def lines(options: dict[str, Any], folder: Path | None = TINY, routers: Any = None, **sections: Any) -> list[str]:
    args = json.loads(json.dumps(CONFIG["applications"][1]["args"]))
    args["routers"]["engine_kwargs"] |= options
    args["routers"] |= {"count": None, **(routers or {})}
    config = parse(LLMAppConfig, {**args, **sections})
    return list(llm_problems(config, folder, complete=False))


def test_the_config_that_ships_has_both_kinds_over_one_pool_of_experts() -> None:
    mesh = MeshConfig.from_serve_config(serve_config("tiny-embeddings.yaml"), folder=CONFIGS)
    assert [each.llm.model.id for each in mesh.meshes] == ["tiny-moe", "tiny-embed"]
    assert len(mesh.pools) == 1
    assert [list(llm_problems(each.llm, TINY, complete=True)) for each in mesh.meshes] == [[], []]
    assert [pools(each.llm.routers.engine_kwargs) for each in mesh.meshes] == [False, True]


def test_routers_that_pool_are_not_refused() -> None:
    for options in ({"runner": "pooling"}, {"convert": "embed"}, {"runner": "pooling", "convert": "classify"}):
        assert lines(options) == []


@pytest.mark.parametrize(
    ("options", "more", "expected"),
    [
        ({}, {"lora_config": LORA}, "lora_config does not go with an engine that pools: nobody has tried"),
        (
            {},
            {"routers": {"count": 2, "expert_signatures": {}}},
            "routers.expert_signatures does not go with an engine that pools: the experts of its prompts are not",
        ),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            {},
            "routers.engine_kwargs.speculative_config does not go with an engine that pools: it guesses tokens",
        ),
        ({"io_processor_plugin": "x"}, {}, "routers.engine_kwargs.io_processor_plugin does not go with"),
    ],
)
@pytest.mark.parametrize("by", ["option", "model"])
def test_what_does_not_go_along_is_refused(
    options: dict[str, Any], more: dict[str, Any], expected: str, by: str, tmp_path: Path
) -> None:
    values = json.loads((TINY / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**values, "architectures": ["Qwen3MoeForSequenceClassification"]})
    )
    options = {**options, "runner": "pooling"} if by == "option" else options
    [line] = lines(options, TINY if by == "option" else tmp_path, **more)
    assert line.startswith(expected)
    assert lines({**options, "runner": "generate"}, tmp_path, **more) == []


def test_prefill_and_decode_apart_is_refused_once() -> None:
    found = lines({"runner": "pooling"}, pools=POOLS)
    assert found == ["pools: prefill and decode apart does not go with an engine that pools, which decodes nothing"]


def test_a_model_that_is_not_here_is_judged_by_options() -> None:
    assert lines({}, None, lora_config=LORA) == []
    assert len(lines({"convert": "embed"}, None, lora_config=LORA)) == 1
