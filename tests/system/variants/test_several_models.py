"""Two models at one address, one of them in two versions, by configs/tiny-two-models.yaml: what clients see of it, a
canary that is promoted and rolled back under streams, and killed routers."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml

from benchmarks.serving.endless_streams import Streams
from tests.support.serve.service import REPOSITORY, Service, running_service
from tests.support.waiting import wait_for

PROMPTS = [[11, 12, 13, 14], [21, 22, 23, 24, 25], [31, 32, 33]]
MODEL, OTHER = "tiny-moe", "tiny-moe-short"


def use_shipped_config(config: dict[str, Any]) -> None:
    """The shipped applications on the port of a test's service."""
    shipped = yaml.safe_load((REPOSITORY / "configs" / "tiny-two-models.yaml").read_text())
    config["applications"] = shipped["applications"]


@pytest.fixture(scope="module")
def two_models() -> Iterator[Service]:
    with running_service(use_shipped_config) as running:
        yield running


def replicas(name: str) -> list[int]:
    """Process ids of a deployment's replicas on this machine, whose names are APPLICATION:DEPLOYMENT."""
    found = psutil.process_iter(["pid", "cmdline"])
    return sorted(each.info["pid"] for each in found if f"ServeReplica:{name}" in " ".join(each.info["cmdline"] or ()))


def shards() -> list[int]:
    return [*replicas("experts:ExpertShard"), *replicas("short-experts:ExpertShard")]


def ask(service: Service, model: str, **more: Any) -> httpx.Response:
    body = {"model": model, "prompt": "def main(", "max_tokens": 4, "temperature": 0, **more}
    return httpx.post(f"{service.url}/v1/completions", json=body, timeout=120)


def test_one_address_has_all_models_for_the_openai_package(two_models: Service) -> None:
    client = two_models.client
    assert [model.id for model in client.models.list()] == [MODEL, OTHER]
    asked: dict[str, Any] = {"prompt": "def main(", "max_tokens": 8, "temperature": 0}
    answers = {name: client.completions.create(model=name, **asked) for name in (MODEL, OTHER)}
    assert {name: answer.model for name, answer in answers.items()} == {MODEL: MODEL, OTHER: OTHER}
    assert answers[MODEL].choices[0].text == answers[OTHER].choices[0].text, "one checkpoint, two pools of experts"
    with pytest.raises(openai.NotFoundError, match=r"`nope` does not exist\. There are: tiny-moe, tiny-moe-short"):
        client.completions.create(model="nope", prompt="x")
    long = [11] * 600  # more than the second model's context
    assert ask(two_models, MODEL, prompt=long).status_code == 200
    assert ask(two_models, OTHER, prompt=long).json()["error"]["code"] == "context_length_exceeded"


def test_a_canary_is_promoted_and_rolled_back_under_streams(two_models: Service) -> None:
    before = shards()
    assert len(before) == 3

    def canary(*words: str) -> str:
        return two_models.run("expertmesh", "canary", *words)

    def versions(count: int) -> Counter[str]:
        return Counter(ask(two_models, MODEL).headers["x-expertmesh-version"] for _ in range(count))

    streams = Streams(two_models.url, MODEL, PROMPTS, max_tokens=64)
    with streams.running() as running:
        wait_for(running.warm, 60, "the first text of every stream")
        canary("set", MODEL, "canary=1", "stable=1")
        assert set(versions(8)) == {"stable", "canary"}
        assert "stable 1, canary 1 -> stable 0, canary 100" in canary("promote", MODEL, "canary")
        assert versions(3) == {"canary": 3}
        assert "canary: 100 %" in canary("show")
        canary("rollback", MODEL)
        assert versions(3) == {"stable": 3}
    everything = running.window(0, float("inf"))
    assert everything.failed == []
    assert everything.requests > 3
    assert shards() == before, "nothing was loaded again"
    assert [len(replicas(f"{app}:Router")) for app in ("llm", "llm-canary", "short")] == [1, 1, 1]


def test_a_killed_router_harms_nobody_else(two_models: Service) -> None:
    two_models.run("expertmesh", "canary", "set", MODEL, "canary=1", "stable=1")
    [of_canary], [of_other] = replicas("llm-canary:Router"), replicas("short:Router")
    os.kill(of_canary, signal.SIGKILL)
    answers = [ask(two_models, MODEL) for _ in range(6)]
    assert [(answer.status_code, answer.headers["x-expertmesh-version"]) for answer in answers] == [(200, "stable")] * 6
    streams = Streams(two_models.url, MODEL, PROMPTS, max_tokens=32)
    with streams.running() as running:
        wait_for(running.warm, 60, "the first text of every stream")
        os.kill(of_other, signal.SIGKILL)
        lost = wait_for(lambda: (a := ask(two_models, OTHER)).status_code == 503 and a, 30, "a clear answer")
        assert lost.json()["error"]["message"] == f"no router of the model '{OTHER}' (only) answers; try again"
        assert lost.headers["retry-after"] == "1"
        assert [model.id for model in two_models.client.models.list()] == [MODEL, OTHER]
        status, health = two_models.get("/health")
        assert (status, b"degraded" in health) == (200, True)
    everything = running.window(0, float("inf"))
    assert everything.failed == []
