"""Ray's head is killed and starts again, its state in Redis: routers and shards on another host serve on meanwhile."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.serving.hosts import Host, NamespacesRefusedError, hosts_on_a_switch
from benchmarks.serving.ray_hosts import GCS_PORT, Node, ray_environment, start_node
from tests.support.command import COMMAND
from tests.support.serve.host_client import Client
from tests.support.serve.hosts_config import PROMPTS, ROOT, START_TIMEOUT_S, config, service_status

pytestmark = [pytest.mark.cluster, pytest.mark.autoscaling, pytest.mark.timeout(1500)]

REDIS_PORT = 6390
RECOVERY_TIMEOUT_S = 300.0


@dataclass
class Service:
    """Three hosts: Ray's head, one with all replicas and a proxy, and Redis."""

    head: Host
    worker: Host
    client: Client
    environment: dict[str, str]

    def start_head(self) -> None:
        """`ray start --head` on a disk that knows of no head before, as in a new pod; RuntimeError with its output."""
        Path(self.head.disk, "ray_current_cluster").unlink(missing_ok=True)
        options = [f"--port={GCS_PORT}", f"--temp-dir={self.head.folder}", "--no-monitor", "--include-dashboard=false"]
        node = Node(self.head, 0)
        started = start_node(node, self.environment, "--head", *options)
        if started.wait(START_TIMEOUT_S) != 0:
            raise RuntimeError(f"ray start --head failed:\n{node.log.read_text()}")

    def wait_until(self, what: str, holds: Callable[[], bool], timeout_s: float) -> None:
        """Look until it holds. Raises TimeoutError with what was waited for."""
        deadline_s = time.monotonic() + timeout_s
        while not holds():
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"not within {timeout_s} s: {what}; {self.client.ask('get', '/expertmesh/status')}")
            time.sleep(0.2)

    def complete(self, midway: Callable[[], None] = lambda: None) -> list[str]:
        """The texts of all prompts; `midway` runs while they stream."""
        self.client.pipe.send(("streams", PROMPTS))
        assert self.client.answer() == "midway"
        midway()
        results = self.client.answer()
        assert [error for _, error in results if error] == []
        return [text for text, _ in results]

    def shards(self) -> dict[int, int]:
        """Process ids of the shards that serve, by rank."""
        controller: dict[str, Any] = service_status(self.client)["controller"] or {}
        return {shard["rank"]: shard["pid"] for shard in controller.get("shards", ()) if shard["serving"]}


def serve_config() -> dict[str, Any]:
    """The applications, all on the host that is not the head; a proxy on every node, as KubeRay has them."""
    whole = config()
    whole["proxy_location"] = "EveryNode"
    return whole


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed (apt-get install redis-server)")
    with contextlib.ExitStack() as stack:
        try:
            hosts = stack.enter_context(hosts_on_a_switch(3))
        except NamespacesRefusedError as refused:
            pytest.skip(f"no network namespaces here: {refused}")
        yield _start(*hosts)


def _start(head: Host, worker: Host, store: Host) -> Service:
    options = [f"--bind={store.address}", f"--port={REDIS_PORT}", "--protected-mode=no", "--save=", "--appendonly=no"]
    words = [word for option in options for word in option.split("=", 1)]
    store.popen("redis-server", *words, cwd=store.disk, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    environment = {
        **ray_environment(),
        "RAY_REDIS_ADDRESS": f"{store.address}:{REDIS_PORT}",
        "RAY_external_storage_namespace": "expertmesh-test",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "600",  # how long nodes outlive their head; KubeRay sets it likewise
    }
    made = Service(head, worker, Client(worker), environment)
    made.start_head()
    node = Node(worker, 4, {"router_host": 1, "shard_host": 2})
    if start_node(node, environment, f"--address={head.address}:{GCS_PORT}").wait(START_TIMEOUT_S) != 0:
        raise RuntimeError(f"ray start on {worker.name} failed:\n{node.log.read_text()}")
    path, log_path = Path(head.disk) / "mesh.yaml", Path(head.disk) / "serve.log"
    path.write_text(yaml.safe_dump(serve_config()))
    with log_path.open("w") as log:
        command = [*COMMAND, "serve", f"{head.folder}/{path.name}", "--verbose", f"--address={head.address}:{GCS_PORT}"]
        server = head.popen(*command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

    def healthy() -> bool:
        if server.poll() is not None:
            raise RuntimeError(f"the service ended:\n{log_path.read_text()[-8000:]}")
        return bool(made.client.ask("get", "/health")[0] == 200)

    made.wait_until("/health is 200", healthy, START_TIMEOUT_S)
    return made


def test_the_head_restarts_and_nobody_else_notices(service: Service) -> None:
    undisturbed = service.complete()
    before = service.shards()
    assert sorted(before) == [0, 1]

    assert service.complete(service.head.kill_all) == undisturbed, "streams that were running"
    assert service.complete() == undisturbed, "requests that begin without a head"

    service.start_head()
    assert service.complete() == undisturbed
    assert service.shards() == before, "no shard was started again"

    os.kill(before[1], signal.SIGKILL)

    def replaced() -> bool:
        shards = service.shards()
        return sorted(shards) == [0, 1] and shards[1] != before[1]

    service.wait_until("Serve, after its head is back, replaces a lost shard", replaced, RECOVERY_TIMEOUT_S)
    assert service.shards()[0] == before[0]
    assert service.complete() == undisturbed
