"""Pools whose KV cache goes over vLLM's NixlConnector: real NIXL and UCX, between engines on CPUs.

The oracle is the decode router itself: it computes the prompts of a request with several of them.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving.endless_streams import Streams
from tests.support.serve.pools import PROMPTS, greedy, pids, routers, use_pools, whole
from tests.support.serve.service import API_KEY, Service, running_service
from tests.support.waiting import wait_for

NIXL = Path(sys.prefix) / "nixl"  # a folder of its own, where the Makefile puts it
PATIENCE_S = 300.0  # for a router, on a machine that does other things too

pytestmark = pytest.mark.skipif(not NIXL.exists(), reason="NIXL is not installed; `make test` does it")


@pytest.fixture(scope="module")
def pools() -> Iterator[Service]:
    def use_nixl(config: dict[str, Any]) -> None:
        use_pools(config)
        routers = config["applications"][1]["args"]["routers"]
        routers["engine_kwargs"]["kv_transfer_config"] = {"kv_connector": "NixlConnector"}
        routers["env_vars"]["PYTHONPATH"] = str(NIXL)

    with running_service(use_nixl) as running:
        yield running


def test_prompts_that_come_over_nixl_give_the_tokens_of_one_router(pools: Service) -> None:
    """Both routers are on one host, each with a port of its own for handshakes."""
    alone = greedy(pools, PROMPTS)
    assert routers(pools)["decode"]["prompts_handed_over"] == 0
    assert [greedy(pools, [prompt])[0] for prompt in PROMPTS] == alone
    found = routers(pools)
    assert (found["decode"]["prompts_handed_over"], found["decode"]["prompts_given_up"]) == (len(PROMPTS), 0)
    assert found["prefill"]["rows"] > 0


def test_a_prefill_router_killed_under_streams_fails_no_request(pools: Service) -> None:
    """Also those whose blocks it had: vLLM by itself would fail them."""
    before, victim = pools.shards(), routers(pools)["prefill"]["pid"]
    streams = Streams(pools.url, "tiny-moe", PROMPTS, max_tokens=32, api_key=API_KEY)
    with streams.running() as running:
        wait_for(running.warm, 60, "the first text of every stream")
        os.kill(victim, signal.SIGKILL)
        handed_over = routers(pools)["decode"]["prompts_handed_over"]
        wait_for(lambda: whole(pools, but=victim), PATIENCE_S, "another prefill router")
        asked = lambda: routers(pools)["decode"]["prompts_handed_over"] > handed_over + 4  # noqa: E731
        wait_for(asked, 60, "the new prefill router to be asked")
    everything = running.window(0, float("inf"))
    assert everything.failed == []
    assert everything.changed == 0
    assert pids(pools.shards()) == pids(before)
