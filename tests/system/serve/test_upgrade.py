"""An upgrade of the application `llm` alone, which the shards do not notice. Last, since it replaces the routers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.support.serve.service import Service
from tests.support.waiting import wait_for


def test_llm_is_upgraded_to_two_routers_while_the_shards_stay(service: Service) -> None:
    expected = service.greedy(48)
    before = service.shards()
    old = {router["router_id"] for router in service.status()["routers"]}
    llm = service.config["applications"][1]["args"]
    llm["routers"] |= {"count": 2}
    llm["routers"]["engine_kwargs"]["max_num_seqs"] = 16
    config = str(service.write_config("upgrade.yaml"))
    serve = str(Path(sys.executable).parent / "serve")
    service.run(
        *("ray", "job", "submit", "--address", service.dashboard, "--no-wait"),
        *("--", serve, "run", "--non-blocking", config),
    )

    def upgraded() -> bool:
        try:
            code, body = service.get("/expertmesh/status")
        except OSError:
            return False
        routers = json.loads(body)["routers"] if code == 200 else []
        names = {router["router_id"] for router in routers}
        return len(names) == 2 and not names & old and service.get("/health")[0] == 200

    wait_for(upgraded, 400, "two new routers")
    after = service.shards()
    for rank, shard in before.items():
        assert after[rank]["pid"] == shard["pid"]
        assert after[rank]["weights_digest"] == shard["weights_digest"]
        assert after[rank]["incarnation"] == shard["incarnation"]
        assert len(after[rank]["routers"]) == 2, "both routers share the shard"

    def both_worked() -> bool:
        assert service.greedy(48) == expected
        return all(router["steps"] > 60 for router in service.status()["routers"])

    wait_for(both_worked, 120, "both routers to have had requests")

    service.run("serve", "deploy", config, "--address", service.dashboard)
    wait_for(lambda: "RUNNING" in service.run("serve", "status", "--address", service.dashboard), 60, "serve status")
    assert {router["router_id"] for router in service.status()["routers"]} == {
        router for shard in after.values() for router in shard["routers"]
    }, "the same config again changes nothing"
