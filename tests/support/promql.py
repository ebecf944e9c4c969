"""Checks of PromQL without a server: names of series against what exports them, and promtool's parser."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from cluster.observability.reference import SECTIONS

PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool, of Debian's prometheus, is not installed")

# What Grafana puts in place of its variables, with everything chosen.
GRAFANA = {"$namespace": ".*", "$application": ".*", "$router": ".*", "$rank": ".*", "$__rate_interval": "1m"}


def with_everything_chosen(expr: str) -> str:
    """A panel's expression as Grafana sends it."""
    for name, value in GRAFANA.items():
        expr = expr.replace(name, value)
    assert "$" not in expr, expr
    return expr


def series_in(expr: str) -> set[str]:
    """Names of Ray's series in an expression."""
    return set(re.findall(r"\bray_\w+", expr))


def unknown_series(expr: str, histograms_as_such: bool = False) -> set[str]:
    """Those that neither this project nor vLLM nor Serve exports.

    `histograms_as_such`: a page may name a histogram, which only has _bucket, _sum and _count.
    """
    return {name for name in series_in(expr) if not _is_exported(name, histograms_as_such)}


def _is_exported(name: str, histograms_as_such: bool) -> bool:
    ours = {series.exported_name for table in SECTIONS.values() for series in table}
    if name.startswith("ray_expertmesh_"):
        return name in ours
    histogram = re.sub(r"_(bucket|sum|count)$", "", name)
    if name.startswith("ray_vllm_"):
        of_vllm = _of_vllm()
        plain = name.removeprefix("ray_vllm_")
        if (as_histogram := of_vllm.get(histogram.removeprefix("ray_vllm_"))) == "histogram":
            return histogram != name or (histograms_as_such and as_histogram is not None)
        if of_vllm.get(plain.removesuffix("_total")) == "counter":
            return plain.endswith("_total")
        return of_vllm.get(plain) == "gauge"
    named = {
        name.removeprefix("ray_"),
        name.removeprefix("ray_").removesuffix("_total"),
        histogram.removeprefix("ray_"),
    }
    return bool(named & _of_serve())


@functools.cache
def _of_vllm() -> dict[str, str]:
    """Kind by name, from vLLM's source: self._gauge_cls(name="vllm:...")."""
    source = (_folder_of("vllm") / "v1/metrics/loggers.py").read_text()
    return {name: kind for kind, name in re.findall(r'_(gauge|counter|histogram)_cls\(\s*name="vllm:(\w+)"', source)}


@functools.cache
def _of_serve() -> frozenset[str]:
    """Every string in Serve's source that may name a series, {protocol_name} being http."""
    names: set[str] = set()
    for path in (_folder_of("ray") / "serve/_private").rglob("*.py"):
        text = path.read_text().replace("{protocol_name}", "http")
        names |= set(re.findall(r'"(serve_\w+)"', text))
    return frozenset(names)


def _folder_of(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def parse_all(expressions: Iterable[str], folder: Path) -> str:
    """What promtool finds wrong with them, each as a recording rule; empty if it takes all."""
    rules = [{"record": f"test:expr{index}", "expr": expr} for index, expr in enumerate(expressions)]
    path = folder / "expressions.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run([str(PROMTOOL), "check", "rules", str(path)], capture_output=True, text=True, timeout=60)
    return "" if done.returncode == 0 else done.stdout + done.stderr
