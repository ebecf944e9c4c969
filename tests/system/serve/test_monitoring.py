"""`make monitoring` beside a running service: Prometheus scrapes it, panels have data, an alert fires and clears.

Shortened: scrapes and looks at alerts every second instead of every 15, no `for:` in the rules, and Ray's agent hears
of figures every 2 s instead of every 10.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from cluster.observability.dashboards.__main__ import DASHBOARDS
from cluster.observability.dashboards.model import Panel
from cluster.serve_environment import free_ports
from tests.support.promql import with_everything_chosen
from tests.support.serve.metrics_agent import targets_file
from tests.support.serve.service import REPOSITORY, Service, answers
from tests.support.waiting import wait_for

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not installed (apt-get install prometheus)"
)


@dataclass(frozen=True)
class Prometheus:
    url: str

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The samples of an instant query; an error of Prometheus is an AssertionError."""
        body = urllib.parse.urlencode({"query": expr}).encode()
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/query", body, timeout=30) as response:
                return json.load(response)["data"]["result"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{expr}: {error.read().decode()}") from None

    def values(self, expr: str) -> list[float]:
        """Their values, without NaN."""
        found = [float(sample["value"][1]) for sample in self.query(expr)]
        return [value for value in found if not math.isnan(value)]


def hasty_rules(folder: Path) -> Path:
    """The shipped rules without `for:`."""
    data = yaml.safe_load((REPOSITORY / "configs/monitoring/rules.yaml").read_text())
    for group in data["groups"]:
        for rule in group["rules"]:
            rule.pop("for", None)
    path = folder / "hasty-rules.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture(scope="module")
def prometheus(service: Service) -> Iterator[Prometheus]:
    """As an operator starts it; SIGINT, as by Ctrl-C, ends all of it."""
    wait_for(targets_file(service).exists, 60, "Ray to list its agents")
    port, grafana_port = free_ports(2)
    command = [
        *(sys.executable, "-m", "cluster.observability.monitoring", "--targets", str(targets_file(service))),
        *("--rules", str(hasty_rules(service.folder)), "--interval-s", "1"),
        *("--prometheus-port", str(port), "--grafana-port", str(grafana_port)),
    ]
    log = service.folder / "monitoring.log"
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=file, stderr=file)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: "Ctrl-C stops it" in log.read_text() or process.poll() is not None, 90, "Prometheus to start")
        assert process.poll() is None, log.read_text()
        yield Prometheus(url)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert process.returncode == 0, log.read_text()
    assert not answers(url), "nothing is left behind"


def lacking(prometheus: Prometheus) -> list[str]:
    """Panels without the data that a service with traffic has."""

    def has_data(panel: Panel) -> bool:
        found = [prometheus.values(with_everything_chosen(query.expr)) for query in panel.queries]
        return all(found) or bool(panel.may_be_empty)

    return [f"{each.name}: {panel.title}" for each in DASHBOARDS for panel in each.panels() if not has_data(panel)]


def test_every_panel_of_every_dashboard_has_data(service: Service, prometheus: Prometheus) -> None:
    wait_for(lambda: prometheus.values("up == 1"), 60, "Prometheus to reach an agent")
    with pytest.raises(openai.AuthenticationError):
        service.openai_client("wrong").models.list()

    def complete() -> bool:
        service.greedy(24)  # quantiles and ratios are of the last minute
        return not lacking(prometheus)

    try:
        wait_for(complete, 90, "every panel to have data")
    except AssertionError:
        assert lacking(prometheus) == []


def test_choices_above_the_panels_have_values(service: Service, prometheus: Prometheus) -> None:
    found: dict[str, set[str]] = {}
    for dashboard in DASHBOARDS:
        for variable in dashboard.variables:
            parts = re.fullmatch(r"label_values\((.+), (\w+)\)", variable.query)
            assert parts is not None
            samples = prometheus.query(with_everything_chosen(parts[1]))
            found[variable.name] = {sample["metric"].get(parts[2], "") for sample in samples}
    [router] = service.status()["routers"]
    assert found == {
        "namespace": {""},
        "application": {"experts", "llm"},
        "router": {router["router_id"]},
        "rank": {"0", "1", "2"},
    }
    assert prometheus.query(f'ray_vllm_generation_tokens_total{{ReplicaId="{router["router_id"]}"}}'), "one name for it"


def test_the_alert_for_a_killed_shard_fires_and_clears(service: Service, prometheus: Prometheus) -> None:
    expected = service.greedy(64)
    wait_for(lambda: prometheus.values("ray_expertmesh_ranks_missing == 0"), 60, "the controller's figures")
    assert prometheus.query('ALERTS{alertname="RankMissing"}') == []
    killed = set()

    def fired() -> list[dict[str, Any]]:
        """Of the last minutes. A successor that is quicker than the controller's figures goes as well."""
        found = prometheus.query(
            'max_over_time(ALERTS{alertname="RankMissing", alertstate="firing", application="experts"}[10m])'
        )
        if not found and (pid := service.shards()[1]["pid"]) not in killed:
            killed.add(pid)
            os.kill(pid, signal.SIGKILL)
        return found

    wait_for(fired, 200, "RankMissing to fire")
    assert service.greedy(64) == expected
    cleared = lambda: (  # noqa: E731
        service.shards()[1]["pid"] not in killed and not prometheus.query('ALERTS{alertname="RankMissing"}')
    )
    wait_for(cleared, 180, "RankMissing to clear once the successor serves")
    # The successor's own figures stand beside those of the killed one until the agent forgets those.
    wait_for(lambda: prometheus.values('ray_expertmesh_shard_loaded_bytes{rank="1"} > 0'), 60, "its figures")
