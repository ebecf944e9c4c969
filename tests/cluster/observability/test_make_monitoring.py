"""What `make monitoring` starts and how it ends, with programs in place of Prometheus and Grafana."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.observability import monitoring
from cluster.observability.monitoring import CONFIGS, prometheus_config
from cluster.serve_environment import free_ports
from tests.support.serve.service import REPOSITORY, answers
from tests.support.waiting import wait_for

PROGRAM = """\
#!{python}
# Takes the place of {name}: notes how it was called, and answers 200 to everything.
import http.server, json, os, re, sys
port = int(os.environ.get("GF_SERVER_HTTP_PORT") or re.search(r"127.0.0.1:(\\d+)", " ".join(sys.argv))[1])
with open("{notes}", "w") as file:
    json.dump({{"argv": sys.argv[1:], "env": dict(os.environ), "pid": os.getpid()}}, file)
{more}
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *args):
        pass
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class Programs:
    """A folder for PATH, and what was noted by the programs in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = free_ports(2)

    def install(self, name: str, more: str = "") -> None:
        path = self.folder / name
        notes = self.folder / f"{name}.json"
        path.write_text(PROGRAM.format(python=sys.executable, name=name, notes=notes, more=textwrap.dedent(more)))
        path.chmod(0o755)

    def notes(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / f"{name}.json").read_text())

    def start(self) -> subprocess.Popen[bytes]:
        prometheus, grafana = map(str, self.ports)
        command = [sys.executable, "-m", "cluster.observability.monitoring", "--metrics-port", "18080"]
        with open(self.folder / "said", "w") as said:
            return subprocess.Popen(
                [*command, "--prometheus-port", prometheus, "--grafana-port", grafana],
                cwd=REPOSITORY,
                env={**os.environ, "PATH": str(self.folder)},
                stdout=said,
                stderr=said,
            )

    def said(self) -> str:
        return (self.folder / "said").read_text()

    def run(self) -> tuple[int, str]:
        """(status, what it said), for starts that fail."""
        return self.start().wait(60), self.said()

    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.ports]


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    return Programs(tmp_path)


def test_without_prometheus_it_says_what_to_install(programs: Programs) -> None:
    status, said = programs.run()
    assert status == 1
    assert "apt-get install prometheus" in said


def test_a_port_that_is_taken_is_named_with_the_way_out(programs: Programs) -> None:
    programs.install("prometheus")
    with socket.create_server(("127.0.0.1", programs.ports[0])):
        status, said = programs.run()
    assert status == 1
    assert f"port {programs.ports[0]}" in said
    assert "--prometheus-port" in said


@pytest.mark.parametrize("name", ["prometheus", "grafana"])
def test_a_program_that_does_not_start_is_quoted(programs: Programs, name: str) -> None:
    for each in ("prometheus", "grafana"):
        programs.install(each, 'sys.exit("the disk is full")' if each == name else "")
    status, said = programs.run()
    assert status == 1
    assert f"{name.title()} does not start" in said
    assert "the disk is full" in said
    assert not any(answers(url) for url in programs.urls())


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_both_run_until_it_ends(programs: Programs, end: signal.Signals) -> None:
    programs.install("prometheus")
    programs.install("grafana")
    process = programs.start()
    try:
        wait_for(lambda: "Ctrl-C stops" in programs.said() or process.poll() is not None, 60, "both to answer")
        assert all(map(answers, programs.urls())), programs.said()
        process.send_signal(end)
        status = process.wait(60)
    finally:
        process.kill()
    assert status == (-end if end == signal.SIGKILL else 0), programs.said()
    wait_for(lambda: not any(map(answers, programs.urls())), 30, "both to be gone")
    grafana = programs.notes("grafana")
    assert grafana["argv"][0] == "server"
    assert grafana["env"]["PROMETHEUS_PORT"] == str(programs.ports[0])
    provisioning = Path(grafana["env"]["GF_PATHS_PROVISIONING"])
    [source] = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"].endswith(":${PROMETHEUS_PORT}")
    [provider] = yaml.safe_load((provisioning / "dashboards/expertmesh.yaml").read_text())["providers"]
    name = provider["options"]["path"].strip("${}")
    assert {path.name for path in Path(grafana["env"][name]).iterdir()} == {"service.json", "mesh.json", "shards.json"}
    assert f"http://127.0.0.1:{programs.ports[1]}/dashboards" in programs.said()


def test_without_grafana_prometheus_runs_alone_and_its_end_is_told(programs: Programs) -> None:
    programs.install("prometheus")
    process = programs.start()
    try:
        wait_for(lambda: "Ctrl-C stops" in programs.said() or process.poll() is not None, 60, "it to answer")
        os.kill(programs.notes("prometheus")["pid"], signal.SIGKILL)
        status = process.wait(60)
    finally:
        process.kill()
    assert status == 1
    assert "Grafana is not on the PATH" in programs.said()
    assert "Prometheus ended" in programs.said()


def options(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(
        **{**vars(monitoring._options([])), **changes}  # the command line's defaults
    )


def test_prometheus_is_told_what_the_command_line_says(tmp_path: Path) -> None:
    shipped = yaml.safe_load((CONFIGS / "prometheus.yaml").read_text())
    plain = prometheus_config(options(metrics_port=8080))
    assert plain == {**shipped, "rule_files": [str(CONFIGS / "rules.yaml")]}
    changed = prometheus_config(options(targets=tmp_path / "t.json", interval_s=1, rules=tmp_path / "r.yaml"))
    assert changed["rule_files"] == [str(tmp_path / "r.yaml")]
    assert set(changed["global"].values()) == {"1s"}
    [job] = changed["scrape_configs"]
    assert "static_configs" not in job
    assert job["file_sd_configs"][0]["files"] == [str(tmp_path / "t.json")]


def test_grafana_is_found_by_either_name_with_its_files(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(programs.folder))
    monkeypatch.setattr(monitoring, "HOMES", (str(programs.folder / "home"),))
    assert monitoring.grafana_command() is None
    programs.install("grafana-server")
    assert monitoring.grafana_command() == [str(programs.folder / "grafana-server")]
    (programs.folder / "home/public").mkdir(parents=True)
    homed = [str(programs.folder / "grafana-server"), "--homepath", str(programs.folder / "home")]
    assert monitoring.grafana_command() == homed
