"""The reference of metrics, the alert rules and their runbooks: about series that exist, by Prometheus' conventions."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.observability.metrics import render
from cluster.observability.reference import families, page
from tests.support.serve.statuses import controller_status, router_status

ROOT = Path(__file__).resolve().parents[3]
MONITORING = ROOT / "configs" / "monitoring"
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool, of Debian's prometheus, is not installed")


def rules() -> list[dict[str, Any]]:
    return [
        rule for group in yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"] for rule in group["rules"]
    ]


def exported() -> set[str]:
    """Names as Prometheus has them after a scrape."""
    text = render([router_status()], controller_status()).decode()
    return {line.partition("{")[0].partition(" ")[0] for line in text.splitlines() if not line.startswith("#")}


def test_the_reference_is_what_the_code_exports() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text() == page(), (
        "run: python -m cluster.observability.reference > docs/metrics.md"
    )


def test_names_have_base_units() -> None:
    """https://prometheus.io/docs/practices/naming/"""
    names = [family.name for _, family in families()]
    assert len(names) == len(set(names)) > 50
    wrong = re.compile(r"_(ms|us|ns|milliseconds|kb|mb|gb|kib|mib|percent|total)$|_bytes_|_seconds_")
    assert [name for name in names if wrong.search(name)] == []


def test_rules_ask_for_series_that_exist() -> None:
    loggers = (Path(str(find_spec("vllm").submodule_search_locations[0])) / "v1/metrics/loggers.py").read_text()  # type: ignore[union-attr,index]
    for rule in rules():
        ours = set(re.findall(r"expertmesh_\w+", rule["expr"]))
        theirs = set(re.findall(r"vllm:\w+", rule["expr"]))
        assert ours | theirs
        assert ours <= exported()
        assert all(f'"{name.removesuffix("_bucket")}"' in loggers for name in theirs), theirs


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    runbooks = re.findall(r"^## (\w+)$", (ROOT / "docs" / "runbooks.md").read_text(), re.MULTILINE)
    assert runbooks == [rule["alert"] for rule in rules()]
    for rule in rules():
        assert rule["annotations"]["runbook_url"] == f"docs/runbooks.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("info", "warning", "critical")


def test_every_alert_is_tried() -> None:
    tried = yaml.safe_load((MONITORING / "rules_test.yaml").read_text())["tests"]
    fire = {case["alertname"] for test in tried for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert fire == {rule["alert"] for rule in rules()} - {"RouterBehind"}, "RouterBehind is tried for not firing"


@needs_promtool
@pytest.mark.parametrize(
    "command",
    [
        ["check", "rules", "rules.yaml"],
        ["test", "rules", "rules_test.yaml"],
        ["check", "config", "prometheus.yaml"],
    ],
    ids=" ".join,
)
def test_prometheus_takes_the_files(command: list[str]) -> None:
    done = subprocess.run([str(PROMTOOL), *command], cwd=MONITORING, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_prometheus_finds_nothing_odd_in_what_is_scraped() -> None:
    text = render([router_status()], controller_status())
    done = subprocess.run([str(PROMTOOL), "check", "metrics"], input=text, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
