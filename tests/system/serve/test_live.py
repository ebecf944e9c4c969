"""Shards come and go, and experts move, under streams: no request fails, no token changes, nobody else restarts."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import psutil

from benchmarks.serving.endless_streams import Streams
from tests.support.serve.deploying import deploy, still
from tests.support.serve.service import API_KEY, Service
from tests.support.waiting import wait_for

PROMPTS = [[11, 12, 13, 14], [21, 22, 23, 24, 25], [31, 32, 33], [41]]
START_S = 240.0  # a shard's start, on a machine that does other things too


def streams(service: Service) -> Streams:
    return Streams(service.url, "tiny-moe", PROMPTS, max_tokens=64, api_key=API_KEY)


def pids(controller: dict[str, Any]) -> dict[int, int]:
    return {shard["rank"]: shard["pid"] for shard in controller["shards"]}


def nothing_was_noticed(running: Streams) -> None:
    everything = running.window(0, float("inf"))
    assert everything.failed == []
    assert everything.changed == 0
    assert everything.requests >= len(PROMPTS)


def test_a_shard_comes_and_goes_by_deploy(service: Service) -> None:
    before = wait_for(lambda: still(service, 3), 120, "the service to be still")
    expected = service.greedy(48)
    with streams(service).running() as running:
        wait_for(running.warm, 60, "the first text of every stream")
        deploy(service, lambda by_name: by_name["ExpertShard"].update(num_replicas=4))
        grown = wait_for(lambda: still(service, 4), START_S, "a fourth shard to be filled")
        assert pids(before).items() <= pids(grown).items(), "the others go on"
        [router] = service.status()["routers"]
        new = next(rank for rank in pids(grown) if rank not in pids(before))
        rows = router["shard_rows"][new]
        used = lambda: service.status()["routers"][0]["shard_rows"][new] > rows  # noqa: E731
        wait_for(used, 60, "the new shard to get rows")
        deploy(service, lambda by_name: by_name["ExpertShard"].update(num_replicas=3))
        shrunk = wait_for(lambda: still(service, 3), START_S, "one shard to hand on what it has and go")
    nothing_was_noticed(running)
    assert len(pids(before).items() & pids(shrunk).items()) >= 2
    assert shrunk["migration"]["unserved"] == 0
    assert service.greedy(48) == expected


def test_another_policy_moves_experts_and_restarts_nobody(service: Service) -> None:
    before = wait_for(lambda: still(service, 3), 120, "the service to be still")
    expected = service.greedy(48)
    planned = {"policy": "greedy", "trace": "examples/tiny-moe/trace.npz", "min_replicas": 2}

    def change(by_name: dict[str, dict[str, Any]]) -> None:
        by_name["PlacementController"]["user_config"] |= {"placement": planned}

    with streams(service).running() as running:
        wait_for(running.warm, 60, "the first text of every stream")
        deploy(service, change)

        def moved() -> dict[str, Any] | None:
            found = still(service, 3)
            return (
                found
                if found and found["migration"]["target_version"] > before["migration"]["target_version"]
                else None
            )

        after = wait_for(moved, START_S, "the new placement to be reached")
    nothing_was_noticed(running)
    assert after["term"] == before["term"], "the controller goes on too"
    assert pids(after) == pids(before)
    assert after["migration"]["origin"] == "config"
    assert after["migration"]["copies"] > before["migration"]["copies"]
    assert service.greedy(48) == expected


def test_a_controller_that_restarts_after_it_keeps_the_placement(service: Service) -> None:
    before = wait_for(lambda: still(service, 3), 120, "the service to be still")
    placement = service.get("/expertmesh/placement")[1]
    parent = psutil.Process(before["shards"][0]["pid"]).parent()
    assert parent is not None
    [controller] = [p for p in parent.children() if "PlacementController" in " ".join(p.cmdline())]
    expected = service.greedy(48)
    os.kill(controller.pid, signal.SIGKILL)
    assert service.greedy(48) == expected

    def renewed() -> dict[str, Any] | None:
        found = still(service, 3) if service.status()["controller"] else None
        return found if found and found["term"] != before["term"] else None

    after = wait_for(renewed, START_S, "another life of the controller")
    assert pids(after) == pids(before)
    assert after["migration"]["target_version"] == before["migration"]["target_version"]
    assert after["migration"]["copies"] == 0, "nothing had to move"

    old, new = json.loads(placement), json.loads(service.get("/expertmesh/placement")[1])
    assert new["experts_of_rank"] == old["experts_of_rank"]
