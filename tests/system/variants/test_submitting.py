"""The ways to hand over code that README.md and docs/upgrades.md name, each of them twice with changed code between.

The cluster serves the console alone: it is built and replaced as the other applications are, and starts in seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.serve_environment import free_ports
from tests.support.serve.service import REPOSITORY, ray_head
from tests.support.waiting import wait_for

OLD, NEW = "no router is available", "no router is to be had"
CHANGED = Path("cluster", "router", "client.py")


@dataclass
class Cluster:
    """A Ray cluster whose processes find the code in `code`, as `ray start` in a checkout makes one."""

    code: Path
    env: dict[str, str]
    http: int

    def run(self, *command: str) -> str:
        """The output of one of Ray's commands, run beside the code."""
        done = subprocess.run(
            [str(Path(sys.executable).parent / command[0]), *command[1:]],
            cwd=self.code,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def deploy(self, release: str | None) -> None:
        """`serve deploy` of a config with the console; waits until Serve has carried it out."""
        app: dict[str, Any] = {
            "name": "console",
            "route_prefix": "/expertmesh",
            "import_path": "serve_app:build_console",
        }
        if release is not None:
            app["runtime_env"] = {"env_vars": {"EXPERTMESH_RELEASE": release}}
        config = self.code / "console.yaml"
        http = {"host": "127.0.0.1", "port": self.http}
        config.write_text(yaml.safe_dump({"http_options": http, "applications": [app]}))
        self.run("serve", "deploy", str(config))
        wait_for(lambda: self.state() == "RUNNING", 120, "the console to run")

    def state(self) -> str:
        """What `serve status` says of the console."""
        status = yaml.safe_load(self.run("serve", "status"))
        return str(status["applications"].get("console", {}).get("status"))

    def answer(self) -> str:
        """The console's words for a mesh without routers, which the changed code changes."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/expertmesh/trace", timeout=30) as response:
                return response.read().decode()
        except urllib.error.HTTPError as error:
            with contextlib.suppress(ValueError, KeyError):
                return str(json.loads(error.read())["error"]["message"])
            return str(error)
        except OSError as error:
            return str(error)

    def change_code(self, old: str, new: str) -> None:
        """Edit the code that the cluster's processes import."""
        path = self.code / CHANGED
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    code = tmp_path_factory.mktemp("code")
    for name in ("cluster", "experts", "placement"):
        shutil.copytree(REPOSITORY / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "serve_app.py", code)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # as on a node whose environment is active
    with ray_head(code, PYTHONDONTWRITEBYTECODE="1", PATH=path) as head:
        # The commands of jobs and of Serve go through the dashboard.
        env = {**head.env, "RAY_ADDRESS": head.dashboard, "RAY_DASHBOARD_ADDRESS": head.dashboard}
        yield Cluster(code, env, free_ports(1)[0])


def test_changed_code_runs_once_the_release_changes(cluster: Cluster) -> None:
    cluster.deploy("1")
    wait_for(lambda: cluster.answer() == OLD, 60, "the console to answer")
    cluster.change_code(OLD, NEW)
    cluster.deploy("1")
    assert cluster.answer() == OLD, "Serve compares configs, and this one is the same"
    cluster.deploy("2")
    wait_for(lambda: cluster.answer() == NEW, 60, "the console of the changed code")
    cluster.change_code(NEW, OLD)
    cluster.deploy("3")
    wait_for(lambda: cluster.answer() == OLD, 60, "the code of the third release")


def test_a_job_runs_the_code_of_its_working_directory(cluster: Cluster, tmp_path: Path) -> None:
    for words in ("first words", "second words"):
        (tmp_path / "told.py").write_text(
            f"import placement.command.app\nprint('{words}', placement.command.app.__name__)\n"
        )
        told = cluster.run("ray", "job", "submit", "--working-dir", str(tmp_path), "--", "python", "told.py")
        assert f"{words} placement.command.app" in told
    command = ("python", "-m", "cluster.command", "placement", "--help")
    assert "optimize" in cluster.run("ray", "job", "submit", "--working-dir", str(tmp_path), "--", *command)
