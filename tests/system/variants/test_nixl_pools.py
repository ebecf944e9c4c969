"""Pools whose KV cache goes over vLLM's NixlConnector: real NIXL and UCX, between engines on CPUs.

The oracle is the decode router itself: it computes the prompts of a request with several of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.serve.pools import (
    handed_over_with_the_same_tokens,
    pids,
    through_a_killed_prefill_router,
    use_pools,
)
from tests.support.serve.service import Service, running_service

NIXL = Path(sys.prefix) / "nixl"  # a folder of its own, where the Makefile puts it

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
    handed_over_with_the_same_tokens(pools)


def test_a_prefill_router_killed_under_streams_fails_no_request(pools: Service) -> None:
    """Also those whose blocks it had: vLLM by itself would fail them."""
    before, everything = pools.shards(), through_a_killed_prefill_router(pools)
    assert everything.failed == []
    assert everything.changed == 0
    assert pids(pools.shards()) == pids(before)
