"""The whole service on a Ray cluster of its own, as its users and its operator see it.

It is started as a user starts it: `ray start`, then `expertmesh serve CONFIG`. Everything is on free ports and in
folders of its own, including a copy of the model, and gone at the end: the head node is a child, in its own session.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import yaml

from cluster.serve_environment import environment_of_a_local_cluster, free_ports
from tests.support.command import COMMAND
from tests.support.serve.node_autoscaler import ENVIRONMENT as AUTOSCALER_ENVIRONMENT
from tests.support.serve.node_autoscaler import write_config
from tests.support.waiting import wait_for

REPOSITORY = Path(__file__).parents[3]
API_KEY = "test-key"
START_TIMEOUT_S = 900.0  # several engines start at once, beside other tests


def tiny_config(port: int, folder: Path) -> dict[str, Any]:
    """The shipped config on another port, with keys, a queue limit that a test can reach, and a copy of the model."""
    model = folder / "model"
    model.mkdir()
    for file in (REPOSITORY / "examples" / "tiny-moe").glob("*"):
        if file.suffix in (".json", ".safetensors", ".jinja"):
            shutil.copy(file, model)
    data = yaml.safe_load((REPOSITORY / "configs" / "tiny-cpu.yaml").read_text())
    data["http_options"]["port"] = port
    llm = data["applications"][1]["args"]
    llm["http"] |= {"api_keys": [API_KEY], "max_pending_requests": 6, "retry_after_s": 2}
    llm["model"]["path"] = str(model)
    data["applications"][2]["args"]["http"] = {"api_keys": [API_KEY]}
    return data


def make_patient(config: dict[str, Any]) -> None:
    """A machine that is busy with other tests is late: no replica is ill for that, and no request hopeless."""
    for app in config["applications"]:
        for section in ("shards", "routers"):
            if section in app["args"]:
                app["args"][section].setdefault("deployment_config", {})["health_check_timeout_s"] = 120
        if "routers" in app["args"]:
            app["args"]["routers"].setdefault("fallback", {})["max_ms_per_step"] = 60_000


@dataclass
class Service:
    """The running service as its users see it, and its cluster as an operator sees it."""

    url: str
    config: dict[str, Any]
    folder: Path
    env: dict[str, str]
    dashboard: str
    command: subprocess.Popen[bytes] | None = None  # `expertmesh serve`
    client: openai.OpenAI = field(init=False)

    @property
    def log(self) -> Path:
        """The command's output."""
        return self.folder / "serve_app.log"

    def __post_init__(self) -> None:
        self.client = self.openai_client(API_KEY)

    def openai_client(self, key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)

    def get(self, path: str, timeout_s: float = 60) -> tuple[int, bytes]:
        """Status and body of a GET with the key, whatever the status."""
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {API_KEY}"})
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a POST with the key."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {API_KEY}"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def status(self) -> dict[str, Any]:
        """/expertmesh/status."""
        code, body = self.get("/expertmesh/status")
        assert code == 200, body
        return json.loads(body)

    def shards(self) -> dict[int, dict[str, Any]]:
        """What the controller knows of each shard, by rank, once every shard has sent a heartbeat."""

        def known() -> dict[int, dict[str, Any]]:
            controller = self.status()["controller"] or {"shards": [], "num_ranks": 1}
            found = {s["rank"]: s for s in controller["shards"] if s["serving"] and "weights_digest" in s}
            return found if len(found) == controller["num_ranks"] else {}

        return wait_for(known, 60, "a heartbeat of every shard")

    def greedy(self, num_tokens: int = 48, on_chunk: Callable[[int], None] = lambda _: None) -> str:
        """A streamed greedy completion of a fixed prompt; calls `on_chunk` with the index of each chunk."""
        stream = self.client.completions.create(
            model="tiny-moe",
            prompt="import os\n\n\ndef main(",
            max_tokens=num_tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        text = ""
        for index, chunk in enumerate(stream):
            text += chunk.choices[0].text
            on_chunk(index)
        return text

    def run(self, *command: str, timeout_s: float = 120) -> str:
        """The output of one of Ray's commands, run in the repository with the cluster's environment."""
        done = subprocess.run(
            [str(Path(sys.executable).parent / command[0]), *command[1:]],
            cwd=REPOSITORY,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def write_config(self, name: str) -> Path:
        """Write the current config to a file."""
        path = self.folder / name
        path.write_text(yaml.safe_dump(self.config, sort_keys=False))
        return path


@dataclass(frozen=True)
class Head:
    """The head node of a Ray cluster."""

    folder: Path  # of its own, for everything on disk; gone with the cluster
    address: str
    dashboard: str
    env: dict[str, str]  # for its clients


@contextlib.contextmanager
def ray_head(
    code: Path | None = None, node: dict[str, float] | None = None, most_nodes: int = 0, **more_env: str
) -> Iterator[Head]:
    """`ray start --head` in a folder with the code, by default this repository; everything ends on the way out.

    `node`: resources of the nodes, up to `most_nodes`, that Ray's autoscaler adds as they are needed.
    """
    # Short: the paths of Unix sockets below it may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="em-", dir="/tmp"))
    gcs, dashboard, agent, client_port = free_ports(4)
    code = REPOSITORY if code is None else code
    env = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "RAY_metrics_report_interval_ms": "2000",  # 10 s by default, which every test of a figure would wait for
        **environment_of_a_local_cluster(folder, {}),
        "PYTHONPATH": str(code),
        "OMP_NUM_THREADS": "1",
        **more_env,
    }
    env.pop("PYTEST_CURRENT_TEST", None)
    more = []
    if node is not None:
        path = write_config(folder / "nodes.json", f"127.0.0.1:{gcs}", {"CPU": 4}, node, most_nodes)
        env, more = {**env, **AUTOSCALER_ENVIRONMENT}, [f"--autoscaling-config={path}"]
    command = [
        str(Path(sys.executable).parent / "ray"),
        *("start", "--head", "--block", "--num-cpus=4", "--node-ip-address=127.0.0.1", f"--port={gcs}"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client_port}"),
        *(f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder / 'ray'}", "--disable-usage-stats"),
        *more,
    ]
    with open(folder / "ray.log", "w") as log:
        process = subprocess.Popen(command, cwd=code, env=env, stdout=log, stderr=log, start_new_session=True)
    head = Head(folder, f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", env)
    try:
        wait_for(lambda: answers(head.dashboard) or process.poll() is not None, 120, "Ray's dashboard")
        assert process.poll() is None, (folder / "ray.log").read_text()
        yield head
    finally:
        end_session(process)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def running_service(change: Callable[[dict[str, Any]], None] = lambda config: None, *flags: str) -> Iterator[Service]:
    """Start everything, after a change to its config, and wait for the first token; end it all afterwards.

    `flags` of the command, besides those it needs.
    """
    with ray_head() as head:
        [http] = free_ports(1)
        env = {**head.env, "RAY_ADDRESS": head.address}
        folder = head.folder
        running = Service(f"http://127.0.0.1:{http}", tiny_config(http, folder), folder, env, dashboard=head.dashboard)
        make_patient(running.config)
        change(running.config)
        config = running.write_config("mesh.yaml")
        command = [*COMMAND, "serve", str(config), "--address", head.address, "--port", str(http)]
        command += flags
        with open(running.log, "w") as log:
            process = subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=log, stderr=log)
        running.command = process
        try:
            started = lambda: "Ctrl-C stops it" in running.log.read_text() or process.poll() is not None  # noqa: E731
            wait_for(started, START_TIMEOUT_S, "the first token")
            assert process.poll() is None, running.log.read_text()
            yield running
        finally:
            process.kill()  # the cluster ends with everything in it, so there is nothing to clean up
            process.wait(10)


def answers(url: str) -> bool:
    """Whether anything answers in HTTP there."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def end_session(head: subprocess.Popen[bytes]) -> None:
    """Kill a process that leads a session, such as `ray start --block`, with all processes of the session."""
    for pid in [head.pid, *session_members(head.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    head.wait(10)


def session_members(session_id: int) -> list[int]:
    """Processes that belong to a Unix session."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == session_id:
                    pids.append(int(entry.name))
    return pids
