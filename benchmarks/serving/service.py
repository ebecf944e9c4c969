"""The tiny service on a Ray cluster of its own in this process, whose config is deployed again and again."""

from __future__ import annotations

import contextlib
import copy
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import ROOT
from cluster.serve_environment import environment_of_a_local_cluster

MARK = "EXPERTMESH_BENCH_RUN"  # in the environment of every process of this run's cluster
ROUTER_TITLE, ENGINE_TITLE = b"ray::ServeReplica:llm:Router", b"VLLM::EngineCore"
OUTCOME_TIMEOUT_S = 600.0

Change = Callable[[dict[str, dict[str, Any]]], None]
"""A change to the applications of a config, by name."""


class Service:
    """The service of one config on a cluster of its own."""

    def __init__(self, folder: Path, config: str = "tiny-cpu.yaml") -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._config: dict[str, Any] = yaml.safe_load((ROOT / "configs" / config).read_text())
        self._config["http_options"]["port"] = self.port
        self._mark = secrets.token_hex(8)
        self._folder = folder

    @contextlib.contextmanager
    def running(self, change: Change = lambda apps: None) -> Iterator[Service]:
        """Start Ray and Serve and deploy the config as it ships, but for `change`; end all of it afterwards."""
        os.environ.update(
            {
                **environment_of_a_local_cluster(self._folder, os.environ),
                **{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), MARK: self._mark},
                **{"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "PYTHONPATH": str(ROOT)},
            }
        )
        change({app["name"]: app for app in self._config["applications"]})
        import ray  # it reads its environment when imported
        from ray import serve

        ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="WARNING")
        try:
            serve.start(proxy_location="HeadOnly", http_options=self._config["http_options"])
            self.deploy(lambda apps: None)
            self.wait_for("llm", "RUNNING", lambda: None)
            yield self
        finally:
            serve.shutdown()
            ray.shutdown()

    def deploy(self, change: Change) -> None:
        """Deploy the config that runs with a change, which does not stay for the next deploy."""
        from cluster.ray_joints import deploy_config

        config = copy.deepcopy(self._config)
        change({app["name"]: app for app in config["applications"]})
        deploy_config(config)

    def wait_for(self, name: str, outcome: str, meanwhile: Callable[[], None]) -> str:
        """Await the end of an application's deploy; returns Serve's message. RuntimeError if it ends otherwise."""
        from ray import serve

        end_s = time.monotonic() + OUTCOME_TIMEOUT_S
        status, message = "", ""
        while time.monotonic() < end_s:
            application = serve.status().applications[name]
            replicas = {replica for d in application.deployments.values() for replica in d.replica_states}
            status, message = application.status.value, application.message
            message = "; ".join([message, *(d.message for d in application.deployments.values())])
            if status == "DEPLOY_FAILED" or (status == "RUNNING" and replicas == {"RUNNING"}):
                break
            meanwhile()
            time.sleep(0.5)
        if status != outcome:
            raise RuntimeError(f"the deploy ended as {status}, expected {outcome}: {message}")
        return message

    def processes(self, title: bytes = ROUTER_TITLE) -> set[int]:
        """Ids of the processes of this cluster with a title, by default of the routers."""
        mark, found = f"{MARK}={self._mark}".encode(), set()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                titled = (entry / "cmdline").read_bytes().startswith(title)
                if titled and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.add(int(entry.name))
        return found


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
