"""Request routers before two routers: Serve's that looks for the longest known prefix, and the one by experts."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import openai
import psutil
import pytest

from placement.traces.profile import read_prompts
from tests.support.serve.service import REPOSITORY, Service, running_service
from tests.support.waiting import wait_for

PREFIXES = [(name + " def f(x): return x\n") * 20 for name in ("left", "right", "other", "again")]
TINY = REPOSITORY / "examples" / "tiny-moe"
ROUTING = "ray::ServeReplica:llm:RequestRouter"


@pytest.fixture(scope="module")
def routed() -> Iterator[Service]:
    def change(config: dict[str, Any]) -> None:
        routers = config["applications"][1]["args"]["routers"]
        routers["count"] = 2
        routers["deployment_config"]["request_router_config"] = {
            "request_router_class": "ray.serve.llm.request_router.PrefixCacheAffinityRouter",
            "request_router_kwargs": {"imbalanced_threshold": 100},
        }

    with running_service(change) as running:
        yield running


def rows(service: Service) -> dict[str, int]:
    """Rows that each router sent to shards, by its id."""
    return {router["router_id"]: router["rows"] for router in service.status()["routers"]}


def ask(service: Service, prompt: str) -> str:
    """A short completion, and then the id of the router that computed it: its rows grew most."""
    before = rows(service)
    assert len(before) == 2
    done = service.client.completions.create(model="tiny-moe", prompt=prompt, max_tokens=2, temperature=0)
    assert done.usage is not None
    assert done.usage.completion_tokens == 2
    grown = {name: count - before[name] for name, count in rows(service).items()}
    assert max(grown.values()) > 0
    return max(grown, key=lambda name: grown[name])


def answered(service: Service, prompt: str) -> str:
    """`ask`, or nothing: HAProxy answers 5xx until there is a request router that each of its workers knows."""
    with contextlib.suppress(openai.InternalServerError):
        return ask(service, prompt)
    return ""


def request_router(service: Service) -> int | None:
    """Its process."""
    cluster = psutil.Process(service.shards()[0]["pid"]).parent()
    assert cluster is not None
    for child in cluster.children():
        with contextlib.suppress(psutil.NoSuchProcess):  # which a zombie counts as, too
            if " ".join(child.cmdline()).startswith(ROUTING):
                return child.pid
    return None


def test_requests_go_where_their_prefix_was_also_after_the_request_router_was_lost(routed: Service) -> None:
    wait_for(lambda: len(rows(routed)) == 2, 120, "both routers")
    homes = {prefix: ask(routed, prefix) for prefix in PREFIXES}
    assert len(set(homes.values())) == 2, "what nobody knows goes to the router with the smallest tree"
    for turn in range(3):
        for prefix, home in homes.items():
            assert ask(routed, f"{prefix}{turn}") == home
    victim = request_router(routed)
    assert victim is not None
    os.kill(victim, signal.SIGKILL)

    wait_for(lambda: request_router(routed) not in (None, victim), 120, "a request router")
    for prefix in PREFIXES:
        wait_for(lambda p=prefix: answered(routed, f"{p} after"), 60, "an answer")


def test_prompts_that_take_the_same_experts_go_to_the_same_router(routed: Service) -> None:
    """Two kinds of text; which experts each takes the request router learns from routers alone."""
    before = set(rows(routed))
    routers = routed.config["applications"][1]["args"]["routers"]
    del routers["deployment_config"]["request_router_config"]
    routers["expert_signatures"] = {"report_s": 0.5}
    routed.run("serve", "deploy", str(routed.write_config("signatures.yaml")), "--address", routed.dashboard)
    wait_for(lambda: len(rows(routed)) == 2 and before.isdisjoint(rows(routed)), 240, "two new routers alone")

    def texts(name: str, domain: str) -> list[str]:
        return [str(prompt.text) for prompt in read_prompts(TINY / name) if prompt.domain == domain]

    wait_for(lambda: answered(routed, "first"), 60, "an answer")
    for pair in zip(texts("prompts.jsonl", "code"), texts("prompts.jsonl", "bytecode"), strict=True):
        for text in pair:
            with contextlib.suppress(openai.InternalServerError):
                routed.client.completions.create(model="tiny-moe", prompt=text, max_tokens=1)

    def homes(domain: str) -> set[str]:
        return {answered(routed, text) for text in texts("prompts-unseen.jsonl", domain)[:8]}

    def apart() -> bool:
        code, bytecode = homes("code"), homes("bytecode")
        return len(code) == len(bytecode) == 1 and code != bytecode and "" not in code | bytecode

    wait_for(apart, 60, "each kind of text at a router of its own")
