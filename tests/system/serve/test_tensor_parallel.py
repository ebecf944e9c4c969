"""A router whose engine has two workers (tensor parallelism), by configs/tiny-tp.yaml: the tokens of a router of one
worker, and the same when processes die."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import openai
import psutil
import pytest
import yaml

from benchmarks.serving.endless_streams import Streams
from tests.support.serve.service import API_KEY, REPOSITORY, Service, running_service
from tests.support.waiting import wait_for

PROMPTS = [[11, 12, 13, 14], [21, 22, 23, 24, 25], [31, 32, 33], [41]]
PATIENCE_S = 300.0  # for a shard or a router, on a machine that does other things too


def use_tensor_config(config: dict[str, Any]) -> None:
    """The shipped config, with the port, the keys and the copy of the model of a test's service."""
    shipped = yaml.safe_load((REPOSITORY / "configs" / "tiny-tp.yaml").read_text())
    for ours, theirs in zip(shipped["applications"], config["applications"], strict=True):
        ours["args"] |= {key: theirs["args"][key] for key in ("model", "http") if key in theirs["args"]}
    config["applications"] = shipped["applications"]


@pytest.fixture(scope="module")
def tensor() -> Iterator[Service]:
    with running_service(use_tensor_config) as running:
        yield running


def workers(service: Service) -> list[psutil.Process]:
    """The workers of the one router's engine, by their number."""
    [router] = service.status()["routers"]
    found = psutil.Process(router["pid"]).children(recursive=True)
    return sorted((p for p in found if "Worker_TP" in " ".join(p.cmdline())), key=lambda p: p.cmdline()[0])


def whole(service: Service) -> bool:
    """Both shards are filled, and the one router is connected to them at the controller's epoch."""
    status = service.status()
    controller, routers = status["controller"], status["routers"]
    return (
        bool(controller)
        and controller["complete"]
        and not controller["migration"]["moving"]
        and [shard["state"] for shard in controller["shards"]] == ["serving"] * 2
        and [(router["connected"], router["epoch"]) for router in routers] == [([0, 1], controller["epoch"])]
    )


def test_tokens_are_those_of_a_router_of_one_worker_and_both_workers_are_one_router(
    tensor: Service, service: Service
) -> None:
    assert len(workers(tensor)) == 2
    assert tensor.greedy(160) == service.greedy(160)
    [router] = tensor.status()["routers"]
    assert router["workers"] == 2
    assert sum(router["shard_rows"]) == router["fan_out_sum"] >= router["rows"] > 160, "a row went to each shard once"
    for shard in tensor.shards().values():
        assert shard["routers"] == [router["router_id"]]


def test_a_shard_killed_under_streams_changes_no_token_and_fails_no_request(tensor: Service) -> None:
    wait_for(lambda: whole(tensor), PATIENCE_S, "both shards")
    victim = tensor.shards()[1]["pid"]
    streams = Streams(tensor.url, "tiny-moe", PROMPTS, max_tokens=64, api_key=API_KEY)
    with streams.running() as running:
        wait_for(running.warm, 60, "the first text of every stream")
        os.kill(victim, signal.SIGKILL)
        again = lambda: whole(tensor) and tensor.shards()[1]["pid"] != victim  # noqa: E731
        wait_for(again, PATIENCE_S, "both workers to use the killed shard's successor")
    everything = running.window(0, float("inf"))
    assert everything.failed == []
    assert everything.changed == 0
    assert everything.requests >= len(PROMPTS)


def test_a_killed_worker_takes_its_router_along_and_serve_starts_another(tensor: Service) -> None:
    expected = tensor.greedy(48)
    [router] = tensor.status()["routers"]
    before, engine = tensor.shards(), workers(tensor)
    chunks: list[int] = []

    def kill_early(index: int) -> None:
        chunks.append(index)
        if index == 1:
            engine[1].kill()

    failed = None
    try:
        tensor.greedy(900, kill_early)  # far from its end
    except openai.APIError as error:
        failed = error
    assert failed is not None, f"{len(chunks)} chunks came, and no error"
    wait_for(lambda: not any(p.is_running() for p in engine), 60, "the other worker to end")

    def replaced() -> bool:
        return whole(tensor) and tensor.status()["routers"][0]["router_id"] != router["router_id"]

    wait_for(replaced, PATIENCE_S, "another router")
    assert tensor.greedy(48) == expected
    wait_for(lambda: not psutil.pid_exists(router["pid"]), 60, "the replica without an engine to end")
    assert {rank: shard["pid"] for rank, shard in tensor.shards().items()} == {
        rank: shard["pid"] for rank, shard in before.items()
    }
