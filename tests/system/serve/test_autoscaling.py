"""Load up, nodes up, shards filled; load down, shards drained, nodes gone; and no router while nobody asks."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from benchmarks.serving.endless_streams import Streams
from cluster.serve_environment import free_ports
from tests.support.serve.service import API_KEY, REPOSITORY, Service, ray_head
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.autoscaling, pytest.mark.timeout(1800)]

PATIENCE_S = 400.0  # for a node, a shard or a router, on a machine that does other things too
PROMPTS = [[11 + index, 12, 13, 14 + index] for index in range(8)]


def scaling_config(port: int) -> dict[str, Any]:
    """The shipped config with shards on nodes of their own: one while little happens, two under any load."""
    data = yaml.safe_load((REPOSITORY / "configs" / "tiny-autoscaling.yaml").read_text())
    data["http_options"]["port"] = port
    experts, llm, console = data["applications"]
    experts["args"]["shards"]["ray_actor_options"]["resources"] = {"shard_host": 1}
    shards, controller = experts["deployments"]
    shards["autoscaling_config"] |= {"min_replicas": 1, "max_replicas": 2}
    # No step is that fast, so shards get a tenth of it, and that takes as many as there may be.
    scaling = {"slo": {"time_per_output_token_ms": 0.01}, "shards": {"spare": 0}}
    controller["user_config"]["scaling"] = scaling
    [router] = llm["deployments"]
    router["autoscaling_config"] |= {"min_replicas": 0, "max_replicas": 1, "downscale_to_zero_delay_s": 10}
    llm["args"]["http"] |= {"api_keys": [API_KEY]}
    console["args"]["http"] = {"api_keys": [API_KEY]}
    return data


@pytest.fixture
def service() -> Iterator[Service]:
    """`serve deploy` on a head node beside which Ray's autoscaler may start nodes for shards."""
    with ray_head(node={"CPU": 1, "shard_host": 1}, most_nodes=3) as head:
        [http] = free_ports(1)
        env = {**head.env, "RAY_ADDRESS": head.address}
        running = Service(f"http://127.0.0.1:{http}", scaling_config(http), head.folder, env, head.dashboard)
        running.run("serve", "deploy", str(running.write_config("mesh.yaml")), "--address", head.dashboard)
        yield running


def shards(service: Service) -> list[str]:
    """Their states, by rank; none while the console does not answer."""
    try:
        controller = service.status()["controller"]
    except (OSError, AssertionError):
        return []
    return [shard["state"] for shard in controller["shards"]] if controller else []


def nodes(service: Service) -> int:
    """Nodes that live, but for the head."""
    listed = json.loads(service.run("ray", "list", "nodes", "--address", service.dashboard, "--format", "json"))
    return sum(node["state"] == "ALIVE" and not node["is_head_node"] for node in listed)


def routers(service: Service) -> int:
    """That run or start, as Serve counts."""
    status = yaml.safe_load(service.run("serve", "status", "--address", service.dashboard))
    return sum(status["applications"]["llm"]["deployments"]["Router"]["replica_states"].values())


def ask(service: Service) -> dict[str, str]:
    """Headers of the answer to one request, sent again as long as the answer is that a router starts."""
    body = json.dumps({"model": "tiny-moe", "prompt": [1, 2, 3], "max_tokens": 4}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {API_KEY}"}
    request = urllib.request.Request(f"{service.url}/v1/completions", body, headers)
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
                assert response.status == 200
                return {name.lower(): value for name, value in response.headers.items()}
        except urllib.error.HTTPError as error:
            status, told, text = error.code, error.headers, error.read()
        assert (status, told["x-expertmesh-router-starting"]) == (503, "1"), text
        assert time.monotonic() < deadline_s, "no router came"
        time.sleep(int(told["Retry-After"]))


def test_nodes_shards_and_routers_follow_the_load(service: Service) -> None:
    wait_for(lambda: shards(service) == ["serving"], PATIENCE_S, "the first shard, on a node that came for it")
    assert nodes(service) >= 1
    ask(service)
    with Streams(service.url, "tiny-moe", PROMPTS, max_tokens=64, api_key=API_KEY).running() as running:
        wait_for(lambda: shards(service) == ["serving"] * 2, PATIENCE_S, "a second shard to come and be filled")
        assert nodes(service) == 2
    seen = running.window(0, float("inf"))
    assert (seen.failed, seen.changed) == ([], 0)
    assert seen.requests >= len(PROMPTS)
    wait_for(lambda: shards(service) == ["serving"], PATIENCE_S, "the second shard to hand on what it has and go")
    wait_for(lambda: nodes(service) == 1, PATIENCE_S, "its node to go")
    wait_for(lambda: routers(service) == 0, PATIENCE_S, "the router to go")
    assert float(ask(service)["x-expertmesh-waited-s"]) > 0, "the next request woke one"
