"""A Ray cluster with one node on each of several hosts (`benchmarks.serving.hosts`), for tests and benchmarks."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.common import ROOT
from benchmarks.serving.hosts import Host

GCS_PORT = 6379
START_TIMEOUT_S = 420.0


@dataclass(frozen=True)
class Node:
    """One host as Ray sees it: its CPUs, and the resources that pin deployments to it."""

    host: Host
    num_cpus: int
    resources: dict[str, float] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        """The output of `ray start` on this host."""
        return Path(self.host.disk) / "ray-start.log"


def ray_environment() -> dict[str, str]:
    """Environment of every process of one cluster, with the cluster's own token."""
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_raylet_start_wait_time_s": "120",
        "OMP_NUM_THREADS": "1",
    }


def start_ray(nodes: Sequence[Node], environment: dict[str, str]) -> str:
    """Start Ray on all hosts, with the first as head; returns the cluster's address. Ray ends with the hosts.

    Raises RuntimeError with the output of `ray start`.
    """
    head = nodes[0].host
    address = f"{head.address}:{GCS_PORT}"
    as_head = ["--head", f"--port={GCS_PORT}", f"--temp-dir={head.folder}", "--no-monitor", "--include-dashboard=false"]
    # All in parallel, since most of a start is waiting; the other nodes wait for the head.
    starts = [
        start_node(node, environment, *(as_head if number == 0 else [f"--address={address}"]))
        for number, node in enumerate(nodes)
    ]
    for node, start in zip(nodes, starts, strict=True):
        if start.wait(START_TIMEOUT_S) != 0:
            raise RuntimeError(f"ray start on {node.host.name} failed:\n{node.log.read_text()}")
    return address


def start_node(node: Node, environment: dict[str, str], *options: str) -> subprocess.Popen[str]:
    """`ray start` on one host, with the options of a head or of another node; its output goes to `node.log`."""
    command = [
        *[sys.executable, "-m", "ray.scripts.scripts", "start", f"--node-ip-address={node.host.address}", *options],
        *[f"--num-cpus={node.num_cpus}", f"--resources={json.dumps(node.resources)}"],
        *["--object-store-memory=80000000", "--include-log-monitor=false", "--disable-usage-stats"],
    ]
    with node.log.open("w") as log:
        return node.host.popen(*command, env=environment, stdout=log, stderr=subprocess.STDOUT)
