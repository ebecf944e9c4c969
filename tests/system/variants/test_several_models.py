"""Two models at one address, one of them in two versions, by configs/tiny-two-models.yaml, and routers that embed over
the first one's experts: what clients see of it, a canary that is promoted and rolled back under streams, and killed
shards and routers."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
import yaml

from benchmarks.serving.endless_streams import Streams
from cluster.keys.command import line_of
from tests.support.serve.service import API_KEY, REPOSITORY, Service, make_patient, running_service
from tests.support.waiting import wait_for

FEW = "sk-few"  # a key with few requests a minute
PROMPTS = [[11, 12, 13, 14], [21, 22, 23, 24, 25], [31, 32, 33]]
MODEL, OTHER, EMBEDDER = "tiny-moe", "tiny-moe-short", "tiny-embed"


def use_shipped_config(config: dict[str, Any], keys: Path) -> None:
    """The shipped applications on the port of a test's service, with a list of keys, and another config's embedder."""
    shipped, embeddings = (
        yaml.safe_load((REPOSITORY / "configs" / f"tiny-{name}.yaml").read_text())
        for name in ("two-models", "embeddings")
    )
    config["applications"] = shipped["applications"]
    apps = {app["name"]: app for app in shipped["applications"]}
    [embedder] = [app for app in embeddings["applications"] if app["name"] == "embed"]
    config["applications"].append(embedder)
    make_patient(config)
    apps["console"]["args"]["llm_apps"].append("embed")
    apps["gateway"]["deployments"][0]["user_config"]["models"][EMBEDDER] = {"versions": {"only": {"app": "embed"}}}
    counting = {"serve_app:build_llm": "gateway", "serve_app:build_console": "gateway", "serve_app:build_gateway": None}
    for app in shipped["applications"]:
        if app["import_path"] in counting:
            http = {"keys_file": str(keys), "ledger_app": counting[app["import_path"]]}
            app["args"]["http"] = {name: value for name, value in http.items() if value is not None}


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    keys = tmp_path_factory.mktemp("keys") / "keys.yaml"
    lines = [line_of(API_KEY, name="ops", role="admin"), line_of(FEW, name="few", requests_per_minute=4)]
    keys.write_text("\n".join(lines))
    with running_service(lambda config: use_shipped_config(config, keys)) as running:
        yield running


def replicas(name: str) -> list[int]:
    """Process ids of a deployment's replicas on this machine, whose names are APPLICATION:DEPLOYMENT."""
    found = psutil.process_iter(["pid", "cmdline"])
    return sorted(each.info["pid"] for each in found if f"ServeReplica:{name}" in " ".join(each.info["cmdline"] or ()))


def shards() -> list[int]:
    return [*replicas("experts:ExpertShard"), *replicas("short-experts:ExpertShard")]


def ask(service: Service, model: str, key: str = API_KEY, **more: Any) -> httpx.Response:
    body = {"model": model, "prompt": "def main(", "max_tokens": 4, "temperature": 0, **more}
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{service.url}/v1/completions", json=body, headers=headers, timeout=120)


def test_one_address_has_all_models_for_the_openai_package(two_models: Service) -> None:
    client = two_models.client
    assert [model.id for model in client.models.list()] == [MODEL, OTHER, EMBEDDER]
    asked: dict[str, Any] = {"prompt": "def main(", "max_tokens": 8, "temperature": 0}
    answers = {name: client.completions.create(model=name, **asked) for name in (MODEL, OTHER)}
    assert {name: answer.model for name, answer in answers.items()} == {MODEL: MODEL, OTHER: OTHER}
    assert answers[MODEL].choices[0].text == answers[OTHER].choices[0].text, "one checkpoint, two pools of experts"
    with pytest.raises(
        openai.NotFoundError, match=r"`nope` does not exist\. There are: tiny-moe, tiny-moe-short, tiny-e"
    ):
        client.completions.create(model="nope", prompt="x")
    long = [11] * 600  # more than the second model's context
    assert ask(two_models, MODEL, prompt=long).status_code == 200
    assert ask(two_models, OTHER, prompt=long).json()["error"]["code"] == "context_length_exceeded"


def test_a_key_has_one_limit_for_all_models(two_models: Service) -> None:
    """Its usage too, whichever pool's console is asked."""
    answers = [ask(two_models, model, FEW) for model in (MODEL, OTHER) * 2]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["3", "2", "1", "0"]
    for model in (MODEL, OTHER):
        refused = ask(two_models, model, FEW)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")

    def usage() -> dict[str, Any]:
        status, body = two_models.get("/expertmesh/usage")
        assert status == 200, body
        return dict(json.loads(body))

    told = wait_for(
        lambda: (u := usage())["keys"].get("few", {}).get("refused") == 2 and u, 30, "the ledger to hear of it"
    )
    assert told["keys"]["few"]["requests"] == 4
    assert told["complete"], told["errors"]


def test_a_canary_is_promoted_and_rolled_back_under_streams(two_models: Service) -> None:
    before = shards()
    assert len(before) == 3

    def canary(*words: str) -> str:
        return two_models.run("expertmesh", "canary", *words)

    def versions(count: int) -> Counter[str]:
        return Counter(ask(two_models, MODEL).headers["x-expertmesh-version"] for _ in range(count))

    streams = Streams(two_models.url, MODEL, PROMPTS, max_tokens=64, api_key=API_KEY)
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


def test_embeddings_stay_the_same_through_a_killed_shard_of_the_shared_experts(two_models: Service) -> None:
    def embeddings() -> np.ndarray:
        answer = two_models.client.embeddings.create(model=EMBEDDER, input=["def main(", "import os", "a" * 100])
        return np.array([each.embedding for each in answer.data])

    before = embeddings()
    assert np.linalg.norm(before, axis=1) == pytest.approx(1, abs=1e-5)
    text = ask(two_models, MODEL).json()["choices"][0]["text"]
    victim = replicas("experts:ExpertShard")[0]
    os.kill(victim, signal.SIGKILL)
    # Sums in another order differ by some 1e-7 after four layers; a wrong expert by some 1e-2.
    np.testing.assert_allclose(embeddings(), before, rtol=0, atol=1e-5)
    assert ask(two_models, MODEL).json()["choices"][0]["text"] == text
    wait_for(lambda: two_models.shards()[0]["pid"] != victim != two_models.shards()[1]["pid"], 200, "a successor")
    np.testing.assert_allclose(embeddings(), before, rtol=0, atol=1e-5)
    with pytest.raises(openai.NotFoundError, match="embed"):
        two_models.client.completions.create(model=EMBEDDER, prompt="def main(")
    with pytest.raises(openai.NotFoundError, match="runner: pooling"):
        two_models.client.embeddings.create(model=MODEL, input="def main(")


def test_a_killed_router_harms_nobody_else(two_models: Service) -> None:
    two_models.run("expertmesh", "canary", "set", MODEL, "canary=1", "stable=1")
    [of_canary], [of_other] = replicas("llm-canary:Router"), replicas("short:Router")
    os.kill(of_canary, signal.SIGKILL)
    answers = [ask(two_models, MODEL) for _ in range(6)]
    assert [(answer.status_code, answer.headers["x-expertmesh-version"]) for answer in answers] == [(200, "stable")] * 6
    streams = Streams(two_models.url, MODEL, PROMPTS, max_tokens=32, api_key=API_KEY)
    with streams.running() as running:
        wait_for(running.warm, 60, "the first text of every stream")
        os.kill(of_other, signal.SIGKILL)
        lost = wait_for(lambda: (a := ask(two_models, OTHER)).status_code == 503 and a, 30, "a clear answer")
        assert lost.json()["error"]["message"] == f"no router of the model '{OTHER}' (only) answers; try again"
        assert lost.headers["retry-after"] == "1"
        assert [model.id for model in two_models.client.models.list()] == [MODEL, OTHER, EMBEDDER]
        status, health = two_models.get("/health")
        assert (status, b"degraded" in health) == (200, True)
    everything = running.window(0, float("inf"))
    assert everything.failed == []
