"""Processes that die under load: no request fails, tokens stay the same, and the service is whole again after."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable

import openai
import psutil
import pytest

from tests.support.serve.service import Service
from tests.support.waiting import wait_for


def whole(service: Service) -> bool:
    """Every rank is served and filled, and every router is connected to all at the controller's epoch."""
    status = service.status()
    controller = status["controller"]
    return (
        bool(controller)
        and controller["complete"]
        and not controller["missing_ranks"]
        and not controller["migration"]["moving"]
        and all(shard["state"] == "serving" for shard in controller["shards"])
        and all(
            len(router["connected"]) == controller["num_ranks"] and router["epoch"] == controller["epoch"]
            for router in status["routers"]
        )
    )


LONG = 600
"""Tokens enough that an engine is far from its end when a client on a busy machine reads the second chunk."""


def send_early(number: signal.Signals, *pids: int, then: Callable[[], object] = lambda: None) -> Callable[[int], None]:
    """Sends it to the processes at a stream's second chunk and calls `then`; the engine goes on meanwhile."""

    def at_second_chunk(index: int) -> None:
        if index == 1:
            for pid in pids:
                os.kill(pid, number)
            then()

    return at_second_chunk


def test_a_shard_killed_in_mid_stream_changes_no_token_and_comes_back_at_its_rank(service: Service) -> None:
    expected = service.greedy(LONG)
    before, epoch = service.shards(), service.status()["controller"]["epoch"]
    assert service.greedy(LONG, send_early(signal.SIGKILL, before[1]["pid"])) == expected
    wait_for(lambda: whole(service) and service.shards()[1]["pid"] != before[1]["pid"], 120, "rank 1")
    same = lambda: service.shards()[1]["weights_digest"] == before[1]["weights_digest"]  # noqa: E731
    wait_for(same, 60, "a heartbeat of the successor with all of its experts")
    after, status = service.shards(), service.status()
    assert [after[rank]["pid"] for rank in (0, 2)] == [before[rank]["pid"] for rank in (0, 2)]
    assert after[1]["incarnation"] != before[1]["incarnation"]
    assert status["controller"]["epoch"] > epoch
    assert service.greedy(LONG) == expected
    # What a shard counts reaches the controller with its next beat.
    wait_for(lambda: service.shards()[1]["requests"] > 0, 60, "the successor's answers to be counted")


def test_the_controller_restarts_and_everyone_keeps_rank_and_weights(service: Service) -> None:
    expected = service.greedy(64)
    before, epoch = service.shards(), service.status()["controller"]["epoch"]
    term = service.status()["controller"]["term"]
    shard_parent = psutil.Process(before[0]["pid"]).parent()
    assert shard_parent is not None
    [controller] = [p for p in shard_parent.children() if "PlacementController" in " ".join(p.cmdline())]
    assert service.greedy(64, send_early(signal.SIGKILL, controller.pid)) == expected

    def renewed() -> bool:
        found = service.status()["controller"]
        return bool(found) and found["term"] != term and whole(service)

    wait_for(renewed, 120, "another life of the controller")
    after = service.shards()
    assert {rank: shard["pid"] for rank, shard in after.items()} == {
        rank: shard["pid"] for rank, shard in before.items()
    }
    assert service.status()["controller"]["epoch"] > epoch, "epochs never fall"
    assert service.greedy(64) == expected
    assert service.get("/health")[0] == 200


def test_a_shard_that_stops_and_goes_on_is_used_again(service: Service) -> None:
    expected = service.greedy(LONG)
    pid = service.shards()[2]["pid"]
    lost = lambda: any("2" in router["lost"] for router in service.status()["routers"])  # noqa: E731
    noticed = lambda: wait_for(lost, 60, "a router to go on without it")  # noqa: E731
    try:
        assert service.greedy(LONG, send_early(signal.SIGSTOP, pid, then=noticed)) == expected
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: whole(service), 120, "every router to be connected to every shard again")
    assert service.greedy(LONG) == expected


def test_with_every_shard_gone_requests_are_served_and_health_says_503(service: Service) -> None:
    """The router computes the experts itself, from the checkpoint; that is no health."""
    expected = service.greedy(LONG)
    before = service.shards()
    pids = [shard["pid"] for shard in before.values()]
    answers = []

    def unhealthy() -> bool:
        answers.append(service.get("/health"))
        return answers[-1][0] == 503

    told = lambda: wait_for(unhealthy, 60, "/health to say 503")  # noqa: E731
    assert service.greedy(LONG, send_early(signal.SIGKILL, *pids, then=told)) == expected
    assert "no shard answered" in json.loads(answers[-1][1])["reason"]
    wait_for(lambda: whole(service) and service.get("/health")[0] == 200, 150, "all shards")
    held = lambda: [shard["weights_digest"] for _, shard in sorted(service.shards().items())]  # noqa: E731
    had = [shard["weights_digest"] for _, shard in sorted(before.items())]
    wait_for(lambda: held() == had, 60, "heartbeats of all shards with all of their experts")
    assert service.greedy(LONG) == expected


def test_a_killed_router_ends_its_requests_with_an_error_and_leaves_the_shards_alone(service: Service) -> None:
    """What a router holds of a request, its KV cache, dies with it; nothing hangs, and no engine is left behind."""
    expected = service.greedy(64)
    shards = service.shards()
    [router] = service.status()["routers"]
    process = psutil.Process(router["pid"])
    engine = [process, *process.children(recursive=True)]
    assert len(engine) > 1, "vLLM's engine is a process of its own"
    with pytest.raises(openai.APIError):
        service.greedy(LONG, send_early(signal.SIGKILL, router["pid"]))
    wait_for(lambda: not any(psutil.pid_exists(p.pid) and p.is_running() for p in engine), 60, "its engine to end")
    wait_for(lambda: service.status()["routers"] and whole(service), 150, "another router")
    [successor] = service.status()["routers"]
    assert successor["router_id"] != router["router_id"]
    after = service.shards()
    assert {rank: shard["pid"] for rank, shard in after.items()} == {
        rank: shard["pid"] for rank, shard in shards.items()
    }
    assert service.greedy(64) == expected
    assert service.get("/health")[0] == 200
    only = lambda: all(s["routers"] == [successor["router_id"]] for s in service.shards().values())  # noqa: E731
    wait_for(only, 60, "the shards to forget the killed router")
