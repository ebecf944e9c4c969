"""Routers in two pools, by configs/tiny-pools.yaml: one computes prompts and another goes on with them, with the tokens
of one router; a dead one costs a retry.

The oracle is the decode router itself: it computes the prompts of a request with several of them.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.support.serve.pools import (
    PATIENCE_S,
    PROMPTS,
    greedy,
    handed_over_with_the_same_tokens,
    pids,
    routers,
    through_a_killed_prefill_router,
    use_pools,
    whole,
)
from tests.support.serve.service import Service, running_service
from tests.support.waiting import wait_for


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Where KV cache goes through, in shared memory as in the shipped config, but of this test alone."""
    path = Path(tempfile.mkdtemp(prefix="em-kv-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def pools(folder: Path) -> Iterator[Service]:
    with running_service(lambda config: use_pools(config, kv_folder=str(folder))) as running:
        yield running


def test_prompts_of_a_prefill_router_give_the_tokens_of_one_router(pools: Service, folder: Path) -> None:
    found = handed_over_with_the_same_tokens(pools)
    for shard in pools.shards().values():
        assert sorted(shard["routers"]) == sorted(router["router_id"] for router in found.values())
    chat = pools.client.chat.completions.create(
        model="tiny-moe",
        messages=[{"role": "user", "content": "import os\n\n\ndef main(" * 20}],
        max_tokens=4,
        n=2,
        temperature=0.5,
    )
    assert len(chat.choices) == 2
    assert routers(pools)["decode"]["prompts_handed_over"] == len(PROMPTS) + 1
    assert list(folder.iterdir()) == []
    with pytest.raises(openai.BadRequestError, match="kv_transfer_params"):
        pools.client.completions.create(
            model="tiny-moe", prompt="x", extra_body={"kv_transfer_params": {"do_remote_prefill": True}}
        )


def test_a_prefill_router_killed_under_streams_fails_no_request(pools: Service) -> None:
    before, everything = pools.shards(), through_a_killed_prefill_router(pools)
    assert everything.failed == []
    assert everything.changed == 0
    assert everything.requests > len(PROMPTS)
    assert routers(pools)["decode"]["prompts_given_up"] > 0, "without a prefill router the other one computes prompts"
    assert pids(pools.shards()) == pids(before)


def test_a_killed_decode_router_costs_its_own_requests_alone(pools: Service, folder: Path) -> None:
    expected, before, found = greedy(pools, PROMPTS[:1]), pools.shards(), routers(pools)
    os.kill(found["decode"]["pid"], signal.SIGKILL)
    wait_for(lambda: whole(pools, but=found["decode"]["pid"]), PATIENCE_S, "another decode router")
    assert greedy(pools, PROMPTS[:1]) == expected
    after = routers(pools)
    assert after["decode"]["prompts_handed_over"] == 1
    assert after["prefill"]["pid"] == found["prefill"]["pid"]
    assert pids(pools.shards()) == pids(before)
    assert list(folder.iterdir()) == []
