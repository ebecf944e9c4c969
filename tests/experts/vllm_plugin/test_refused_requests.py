"""Requests whose experts are on no shard, in a real engine: they end with an error, alone, and leave nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experts.vllm_plugin.engine_kwargs import EXPERTS_UNAVAILABLE
from tests.support.small_mesh import mesh_of, replicated
from tests.support.zygote.engine_zygote import Zygote
from tests.support.zygote.refusal_jobs import NEW_TOKENS, PROMPTS

pytestmark = pytest.mark.whole_machine

ENGINE_S = 400.0
NUM_LAYERS, NUM_EXPERTS = 2, 64
OVERRIDES = {"hidden_size": 64, "moe_intermediate_size": 64, "num_experts": NUM_EXPERTS, "num_experts_per_tok": 2}
ERROR = ["error", EXPERTS_UNAVAILABLE]


@pytest.fixture(scope="module")
def model(vllm_zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe") / "model"
    job = vllm_zygote.start("checkpoint", family="qwen3_moe", path=str(path), overrides=OVERRIDES)
    vllm_zygote.wait(job, "made")
    return path


@pytest.fixture(scope="module", params=[1, 2], ids=["one worker", "two workers"])
def facts(request: pytest.FixtureRequest, vllm_zygote: Zygote, model: Path) -> dict[str, Any]:
    """Of an engine of one worker; and of two, of which the second refuses rows and the first one's output is heard."""
    with mesh_of(model, replicated(NUM_LAYERS, NUM_EXPERTS, 3, 1)) as mesh:
        job = vllm_zygote.start(
            "refusals_of_requests",
            model=str(model),
            membership=mesh.membership().to_dict(),
            victim=mesh.shards[0].endpoint.pid,
            workers=request.param,
        )
        vllm_zygote.wait(job, "done", ENGINE_S)
    return {**vllm_zygote.events(job), "workers": request.param}


def test_the_scene_is_what_the_tests_need(facts: dict[str, Any]) -> None:
    """Experts of the shared prefix alone are lost; the second request finds the prefix in the cache."""
    assert facts["lost"]
    assert facts["prefix_was_found"]
    for ids, reason, stop in facts["alone"]:
        assert (len(ids), reason, stop) == (NEW_TOKENS, "length", None)


def test_only_the_requests_that_need_lost_experts_end(facts: dict[str, Any]) -> None:
    """The second needs none itself, but it reads what the first wrote to the KV cache in the same step."""
    first, second, *others = facts["refused"]
    assert first == [[], *ERROR]
    assert second == [[], *ERROR]
    assert others == facts["alone"][2:]
    status = facts["status_of_refused"]
    assert status["refused_requests"] == 1
    assert (status["fallback_pairs"] == 0) == (facts["workers"] == 1), "the first of two has time"
    assert facts["refusing"] == [*[False] * (facts["workers"] - 1), True]
    assert status["uncovered_pairs"] == len(facts["lost"])


def test_nothing_that_lacked_experts_is_found_in_the_cache_again(facts: dict[str, Any]) -> None:
    assert facts["after"] == facts["alone"]


def test_with_time_for_them_the_router_computes_the_same_tokens(facts: dict[str, Any]) -> None:
    assert facts["computed"] == facts["alone"]
    status = facts["status_of_computed"]
    assert status["refused_requests"] == 1, "that of before"
    assert status["fallback_pairs"] > 0
    assert status["fallback_ms"] > 0
    assert status["fallback_cached_bytes"] > 0


def test_a_shard_killed_under_requests_ends_those_that_need_it(facts: dict[str, Any]) -> None:
    """What they said before is right; not one token was made without its experts."""
    assert any(facts["needs"])
    for now, before, needs in zip(facts["killed"], facts["alone"][2:], facts["needs"], strict=True):
        if now[1:] == ERROR:
            assert needs
            assert len(now[0]) < NEW_TOKENS
            assert now[0] == before[0][: len(now[0])]
        else:
            assert now == before
    status = facts["status_of_killed"]
    assert set(status["lost"]) == {"0"}
    assert status["refused_requests"] > 1
    assert [one[1:] == ERROR for one in facts["later"]] == facts["needs"]
    assert len(PROMPTS) == len(facts["alone"])
