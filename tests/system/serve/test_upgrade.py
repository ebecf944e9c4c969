"""Upgrades of the application `llm`, which neither the shards nor clients notice. Last, as they replace routers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from benchmarks.serving.endless_streams import Streams
from tests.support.serve.service import API_KEY, Service
from tests.support.waiting import wait_for

PROMPTS = [[11, 12, 13, 14], [21, 22, 23, 24, 25]]
UPGRADE_S = 400.0  # a router's start on a machine that does other things too


def streams(service: Service) -> Streams:
    return Streams(service.url, "tiny-moe", PROMPTS, max_tokens=64, api_key=API_KEY)


def routers(service: Service) -> set[str]:
    """Ids of the routers that answer."""
    return {router["router_id"] for router in service.status()["routers"]}


def deploy(service: Service, name: str) -> Callable[[], str]:
    """`serve deploy` of the service's config; what `serve status` says of its application llm, the reasons included."""
    service.run("serve", "deploy", str(service.write_config(name)), "--address", service.dashboard)
    return lambda: service.run("serve", "status", "--name", "llm", "--address", service.dashboard)


def test_llm_is_upgraded_to_two_routers_under_streams_while_the_shards_stay(service: Service) -> None:
    expected = service.greedy(48)
    before, old = service.shards(), routers(service)
    llm = service.config["applications"][1]["args"]
    llm["routers"] |= {"count": 2}
    llm["routers"]["engine_kwargs"]["max_num_seqs"] = 16
    with streams(service).running() as running:
        wait_for(running.warm, 60, "the first text of every stream")
        deploy(service, "upgrade.yaml")

        def upgraded() -> bool:
            code, body = service.get("/expertmesh/status")
            names = {router["router_id"] for router in json.loads(body)["routers"]} if code == 200 else set()
            return len(names) == 2 and not names & old

        wait_for(upgraded, UPGRADE_S, "two new routers alone")
    everything = running.window(0, float("inf"))
    assert everything.failed == []
    assert everything.changed == 0
    assert everything.requests > 2 * len(PROMPTS)

    def settled() -> dict[int, dict[str, Any]]:
        found = service.shards()
        return found if all(len(shard["routers"]) == 2 for shard in found.values()) else {}

    # The old router goes on with its answers, and keeps its connections until then.
    after = wait_for(settled, 120, "both routers, and no other, to share each shard")
    for rank, shard in before.items():
        assert after[rank]["pid"] == shard["pid"]
        assert after[rank]["weights_digest"] == shard["weights_digest"]
        assert after[rank]["incarnation"] == shard["incarnation"]

    def both_worked() -> bool:
        assert service.greedy(48) == expected
        return all(router["steps"] > 60 for router in service.status()["routers"])

    wait_for(both_worked, 120, "both routers to have had requests")
    status = deploy(service, "again.yaml")
    wait_for(lambda: "RUNNING" in status(), 60, "serve status")
    assert routers(service) == {router for shard in after.values() for router in shard["routers"]}, (
        "the same config again changes nothing"
    )


def test_a_version_that_cannot_come_up_is_refused_and_the_old_one_serves_on(service: Service) -> None:
    old = routers(service)
    options = service.config["applications"][1]["args"]["routers"]["engine_kwargs"]
    with streams(service).running() as running:
        wait_for(running.warm, 60, "the first text of every stream")
        options["max_num_sequences"] = options.pop("max_num_seqs")
        status = deploy(service, "misspelt.yaml")
        wait_for(lambda: "DEPLOY_FAILED" in status(), 60, "the refusal")
        # YAML breaks the lines of the message.
        said = " ".join(status().split())
        assert "max_num_sequences is no engine option of the installed vllm; did you mean max_num_seqs?" in said
        options["max_num_seqs"] = options.pop("max_num_sequences")
        status = deploy(service, "corrected.yaml")
        wait_for(lambda: "RUNNING" in status(), UPGRADE_S, "the corrected config")
    everything = running.window(0, float("inf"))
    assert (everything.failed, everything.changed) == ([], 0)
    assert routers(service) == old, "what is deployed again runs already"
