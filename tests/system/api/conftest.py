"""Engines whose experts are on two live shards, offline and behind the front door, forked from one that has imported
vllm."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.model_api import ModelApi
from tests.support.small_mesh import mesh_of, replicated
from tests.support.zygote.engine_zygote import Zygote

TINY = Path(__file__).parents[3] / "examples" / "tiny-moe"
MODEL_ID = "tiny-moe"
# As in a config (routers.engine_kwargs). Grammars apply from the first token on, so that a test can make the model
# think; and a tiny model would fill its JSON up with white space.
SERVED_WITH = {
    "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
    "reasoning_parser": "qwen3",
    "default_chat_template_kwargs": {"enable_thinking": False},
    "structured_outputs_config": {
        "backend": "xgrammar",
        "enable_in_reasoning": True,
        "disable_any_whitespace": True,
    },
    "enable_prompt_tokens_details": True,
    "block_size": 32,
}


@pytest.fixture(scope="package")
def feature_zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vllm")
    zygote = Zygote(tmp_path_factory.mktemp("features") / "zygote", "engine", "feature_jobs")
    yield zygote
    zygote.close()


@pytest.fixture(scope="package")
def membership() -> Iterator[dict]:
    """Two shards with the experts of the tiny model, as an engine is told of them."""
    with mesh_of(TINY, replicated(4, 32, 2, 1), kernel="torch_loop") as mesh:
        yield mesh.membership(epoch=1).to_dict()


@pytest.fixture(scope="package")
def api(feature_zygote: Zygote, membership: dict) -> Iterator[ModelApi]:
    """The tiny model over HTTP, with a tool parser and a reasoning parser."""
    job = feature_zygote.start(
        "serve", model=str(TINY), model_id=MODEL_ID, engine_kwargs=SERVED_WITH, membership=membership
    )
    yield ModelApi(feature_zygote.wait(job, "url"), MODEL_ID)
    feature_zygote.stop(job)
