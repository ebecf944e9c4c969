"""The whole system on a real Ray cluster of three hosts: router on one, shards on the others; one is cut off."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.serving.hosts import Host, NamespacesRefusedError, hosts_on_a_switch
from benchmarks.serving.ray_hosts import Node, ray_environment, start_ray
from tests.support.command import COMMAND
from tests.support.serve.host_client import ANSWER_TIMEOUT_S, Client
from tests.support.serve.hosts_config import PROMPTS, ROOT, START_TIMEOUT_S, config, service_status

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@dataclass
class Mesh:
    """The running system."""

    hosts: list[Host]  # the router's, and one more for shards than there are shards
    client: Client
    address: str
    environment: dict[str, str]


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with contextlib.ExitStack() as stack:
        try:
            hosts = stack.enter_context(hosts_on_a_switch(4))
        except NamespacesRefusedError as refused:
            pytest.skip(f"no network namespaces here: {refused}")
        yield _start(hosts)


def _start(hosts: list[Host]) -> Mesh:
    environment = ray_environment()
    head, *others = hosts
    nodes = [Node(head, 2, {"router_host": 1}), *(Node(host, 1, {"shard_host": 1}) for host in others)]
    address = start_ray(nodes, environment)
    path = Path(head.disk) / "mesh.yaml"
    path.write_text(yaml.safe_dump(config()))
    log_path = Path(head.disk) / "serve_app.log"
    with log_path.open("w") as log:
        command = [*COMMAND, "serve", f"{head.folder}/{path.name}", "--verbose"]
        command += [f"--address={address}"]
        server = head.popen(*command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    client = Client(head)
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while client.ask("get", "/health")[0] != 200:
        if server.poll() is not None or time.monotonic() > deadline_s:
            raise RuntimeError(f"/health was not 200 within {START_TIMEOUT_S} s:\n{log_path.read_text()[-8000:]}")
        time.sleep(0.2)
    return Mesh(hosts, client, address, environment)


def status_of(mesh: Mesh) -> dict[str, Any]:
    return service_status(mesh.client)


def complete(mesh: Mesh, midway: Any) -> list[str]:
    """The texts of all prompts; `midway` runs while they stream."""
    mesh.client.pipe.send(("streams", PROMPTS))
    assert mesh.client.answer() == "midway"
    midway()
    still_streaming = not mesh.client.pipe.poll(0)
    results = mesh.client.answer()
    assert [error for _, error in results if error] == []
    assert still_streaming, "the streams ended before the fault"
    return [text for text, _ in results]


def shards_by_address(mesh: Mesh) -> dict[str, dict[str, Any]]:
    """Every shard that serves."""
    controller = status_of(mesh)["controller"]
    return {s["endpoint"]["host"]: s for s in controller["shards"] if s["serving"] and "endpoint" in s}


def test_a_drained_node_hands_its_shard_on_to_another_node(mesh: Mesh) -> None:
    undisturbed = complete(mesh, lambda: None)
    before = shards_by_address(mesh)
    leaver, stayer = sorted(before.items())
    drain = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--node-id", leaver[1]["node_id"]]
    drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
    drain += ["--deadline-remaining-seconds", "900", f"--address={mesh.address}"]
    told = mesh.hosts[0].popen(*drain, env=mesh.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = told.communicate(timeout=ANSWER_TIMEOUT_S)
    assert told.returncode == 0, output
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        assert complete(mesh, lambda: None) == undisturbed
        after, migration = shards_by_address(mesh), status_of(mesh)["controller"]["migration"]
        if len(after) == 2 and leaver[0] not in after and not migration["moving"]:
            break
        assert time.monotonic() < deadline_s, f"the drained node still has its shard: {status_of(mesh)}"
    assert after[stayer[0]]["pid"] == stayer[1]["pid"]
    assert migration["unserved"] == 0
    [router] = status_of(mesh)["routers"]
    assert router["fallback_pairs"] == 0, "there was always a shard that had each expert"
    assert set(router["transports"].values()) == {"tcp"}
    assert migration["failed_copies"] == 0
    assert complete(mesh, lambda: None) == undisturbed


def test_a_host_cut_off_in_mid_stream_changes_no_token(mesh: Mesh) -> None:
    before = status_of(mesh)
    [router] = before["routers"]
    assert set(router["transports"].values()) == {"tcp"}
    assert len(router["connected"]) == 2
    addresses = {address: shard["rank"] for address, shard in shards_by_address(mesh).items()}
    assert set(addresses) < {host.address for host in mesh.hosts[1:]}

    undisturbed = complete(mesh, lambda: None)
    assert all(undisturbed)
    [router] = status_of(mesh)["routers"]
    assert not router["lost"].keys() & {str(rank) for rank in addresses.values()}
    assert min(router["shard_rows"][rank] for rank in addresses.values()) > 0

    cut = next(host for host in mesh.hosts[1:] if host.address in addresses)
    disturbed = complete(mesh, cut.cut)
    assert disturbed == undisturbed
    [router] = status_of(mesh)["routers"]
    rank = addresses[cut.address]
    assert rank not in router["connected"]
    assert str(rank) in router["lost"]
    assert router["fallback_pairs"] > 0
    code, text = mesh.client.ask("get", "/health")
    assert code == 200, text
