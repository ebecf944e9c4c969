"""A service of configs/tiny-pools.yaml, seen from outside: its two pools, and what it answers."""

from __future__ import annotations

import os
import signal
from typing import Any

import yaml

from benchmarks.serving.endless_streams import Streams, Window
from tests.support.serve.service import API_KEY, REPOSITORY, Service, make_patient
from tests.support.waiting import wait_for

TOKENS = 48
PATIENCE_S = 300.0  # for a router, on a machine that does other things too
PROMPTS = [[11 + 7 * (n + number) % 500 for n in range(90 + 40 * number)] for number in range(4)]


def use_pools(config: dict[str, Any], **section: Any) -> None:
    """The shipped applications on the model and the port of a test's service, with more in their section `pools`."""
    shipped = yaml.safe_load((REPOSITORY / "configs" / "tiny-pools.yaml").read_text())
    for ours, theirs in zip(shipped["applications"], config["applications"], strict=True):
        ours["args"] |= {key: theirs["args"][key] for key in ("model", "http") if key in theirs["args"]}
    shipped["applications"][1]["args"]["pools"] |= section
    config["applications"] = shipped["applications"]
    make_patient(config)


def routers(service: Service) -> dict[str, dict[str, Any]]:
    """The routers that answer, by their pool."""
    return {router["pool"]: router for router in service.status()["routers"]}


def whole(service: Service, *, but: int = -1) -> bool:
    """A router of each pool is connected to both shards at the controller's epoch, none of them the process `but`."""
    status, found = service.status(), routers(service)
    return found.keys() == {"prefill", "decode"} and all(
        (router["connected"], router["epoch"]) == ([0, 1], status["controller"]["epoch"]) and router["pid"] != but
        for router in found.values()
    )


def greedy(service: Service, prompts: list[Any]) -> list[str]:
    answer = service.client.completions.create(
        model="tiny-moe", prompt=prompts, max_tokens=TOKENS, temperature=0, extra_body={"ignore_eos": True}
    )
    return [choice.text for choice in answer.choices]


def handed_over_with_the_same_tokens(service: Service) -> dict[str, dict[str, Any]]:
    """Has every prompt computed by the decode router and by the prefill router; returns the routers after that."""
    alone = greedy(service, PROMPTS)
    assert routers(service)["decode"]["prompts_handed_over"] == 0
    assert [greedy(service, [prompt])[0] for prompt in PROMPTS] == alone
    found = routers(service)
    assert (found["decode"]["prompts_handed_over"], found["decode"]["prompts_given_up"]) == (len(PROMPTS), 0)
    assert found["prefill"]["rows"] > 0
    return found


def through_a_killed_prefill_router(service: Service) -> Window:
    """What came of streams from before a prefill router is killed until its successor has computed prompts."""
    victim = routers(service)["prefill"]["pid"]
    streams = Streams(service.url, "tiny-moe", PROMPTS, max_tokens=32, api_key=API_KEY)
    with streams.running() as running:
        wait_for(running.warm, 60, "the first text of every stream")
        os.kill(victim, signal.SIGKILL)
        handed_over = routers(service)["decode"]["prompts_handed_over"]
        wait_for(lambda: whole(service, but=victim), PATIENCE_S, "another prefill router")
        asked = lambda: routers(service)["decode"]["prompts_handed_over"] > handed_over + 4  # noqa: E731
        wait_for(asked, 60, "the new prefill router to be asked")
    return running.window(0, float("inf"))


def pids(shards: dict[int, dict[str, Any]]) -> dict[int, int]:
    return {rank: shard["pid"] for rank, shard in shards.items()}
