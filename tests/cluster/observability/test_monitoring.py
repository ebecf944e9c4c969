"""The reference of metrics, the alert rules and their runbooks: about series that exist, as promtool takes them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.observability.reference import page
from tests.support.promql import PROMTOOL, needs_promtool, unknown_series

ROOT = Path(__file__).resolve().parents[3]
MONITORING = ROOT / "configs" / "monitoring"


def rules() -> list[dict[str, Any]]:
    return [
        rule for group in yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"] for rule in group["rules"]
    ]


def test_the_reference_is_what_the_code_exports() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text() == page(), (
        "run: python -m cluster.observability.reference > docs/metrics.md"
    )


def test_rules_ask_for_series_that_exist() -> None:
    for rule in rules():
        assert "ray_" in rule["expr"]
        assert unknown_series(rule["expr"]) == set(), rule["alert"]
    assert unknown_series("rate(ray_expertmesh_stepz_total[5m]) + ray_vllm_nothing + ray_serve_nothing") == {
        "ray_expertmesh_stepz_total",
        "ray_vllm_nothing",
        "ray_serve_nothing",
    }


@pytest.mark.parametrize("doc", ["runbooks.md", "live-experts.md", "autopilot.md", "kuberay.md"])
def test_pages_name_series_that_exist(doc: str) -> None:
    text = (ROOT / "docs" / doc).read_text()
    named = re.findall(r"`(ray_(?:expertmesh|vllm|serve)_\w+)`", text)
    assert unknown_series(" ".join(named), histograms_as_such=True) == set()


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    runbooks = re.findall(r"^## (\w+)$", (ROOT / "docs" / "runbooks.md").read_text(), re.MULTILINE)
    assert runbooks == [rule["alert"] for rule in rules()]
    for rule in rules():
        assert rule["annotations"]["runbook_url"] == f"docs/runbooks.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("info", "warning", "critical")


def test_every_alert_fires_in_a_test_and_keeps_still_in_one() -> None:
    tried = yaml.safe_load((MONITORING / "rules_test.yaml").read_text())["tests"]
    cases = [case for test in tried for case in test["alert_rule_test"]]
    names = {rule["alert"] for rule in rules()}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == names
    at_once = {"KVCacheFull", "ManyRequestsWaiting", "SlowRequests", "FallbackInUse"}
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} >= names - at_once


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
