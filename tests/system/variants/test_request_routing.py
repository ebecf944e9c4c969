"""Serve's request router that looks for the longest known prefix, before two routers."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import openai
import psutil
import pytest

from tests.support.serve.service import Service, running_service
from tests.support.waiting import wait_for

PREFIXES = [(name + " def f(x): return x\n") * 20 for name in ("left", "right", "other", "again")]
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

    def answered(prompt: str) -> str:
        """HAProxy answers 503 until there is another one, and until each of its workers knows it."""
        with contextlib.suppress(openai.InternalServerError):
            return ask(routed, prompt)
        return ""

    wait_for(lambda: request_router(routed) not in (None, victim), 120, "a request router")
    for prefix in PREFIXES:
        wait_for(lambda p=prefix: answered(f"{p} after"), 60, "an answer")
