"""Grafana's dashboards: files are those of the code, queries parse, ask for series that exist, and leave none out."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from cluster.observability.dashboards.__main__ import DASHBOARDS, files
from cluster.observability.dashboards.model import COLUMNS, Dashboard, Panel, Query
from cluster.observability.reference import SECTIONS
from tests.support.promql import needs_promtool, parse_all, series_in, unknown_series, with_everything_chosen

UNITS = {"short", "none", "s", "ms", "bytes", "Bps", "percentunit", "reqps", "ops"}
# What panels need not show: the total of what another series has by rank or source, or a number that nobody watches.
NOT_SHOWN = {
    "ray_expertmesh_shard_handed_out_total",
    "ray_expertmesh_autopilot_reports_total",
    "ray_expertmesh_autopilot_windows_total",
}
PANELS = [pytest.param(panel, id=f"{each.name}: {panel.title}") for each in DASHBOARDS for panel in each.panels()]


def test_the_files_are_those_of_the_code() -> None:
    made = files()
    folder = next(path.parent for path in made if path.suffix == ".json")
    assert set(folder.iterdir()) == {path for path in made if path.parent == folder}
    for path, text in made.items():
        assert path.read_text() == text, "run: python -m cluster.observability.dashboards"


@needs_promtool
def test_promtool_parses_every_query(tmp_path: Path) -> None:
    queries = [query.expr for each in DASHBOARDS for panel in each.panels() for query in panel.queries]
    assert parse_all(map(with_everything_chosen, queries), tmp_path) == ""
    assert "unclosed" in parse_all(["sum(rate(x[1m])"], tmp_path)


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_says_what_it_shows(panel: Panel) -> None:
    assert panel.unit in UNITS
    assert panel.description.endswith(".")
    assert panel.queries
    for query in panel.queries:
        assert unknown_series(query.expr) == set()
        assert query.legend
        by = re.findall(r"\{\{(\w+)\}\}", query.legend)
        assert all(re.search(rf"by \([^)]*\b{label}\b", query.expr) for label in by), "the legend names what is left"
        if "_total" in query.expr or "_bucket" in query.expr:
            assert re.search(r"(rate|increase)\(", query.expr), "a counter alone says nothing"
    legends = [query.legend for query in panel.queries]
    assert len(legends) == len(set(legends))


def test_every_series_is_shown() -> None:
    shown = set().union(*(series_in(query.expr) for each in DASHBOARDS for p in each.panels() for query in p.queries))
    exported = {series.exported_name for table in SECTIONS.values() for series in table}
    assert exported - shown == NOT_SHOWN


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda each: each.name)
def test_panels_do_not_overlap_and_queries_use_the_variables_that_there_are(dashboard: Dashboard) -> None:
    data = dashboard.to_json()
    assert len({panel["id"] for panel in data["panels"]}) == len(data["panels"])
    places = [panel["gridPos"] for panel in data["panels"]]
    assert all(place["x"] + place["w"] <= COLUMNS for place in places)
    for one, two in itertools.combinations(places, 2):
        apart = (
            one["x"] + one["w"] <= two["x"]
            or two["x"] + two["w"] <= one["x"]
            or one["y"] + one["h"] <= two["y"]
            or two["y"] + two["h"] <= one["y"]
        )
        assert apart, (one, two)
    titles = [panel.title for panel in dashboard.panels()]
    assert len(titles) == len(set(titles))
    names = {variable["name"] for variable in data["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(data["panels"]))) - {"__rate_interval"}
    assert used == names, "each choice changes something"
    assert all(
        unknown_series(each["definition"]) == set() for each in data["templating"]["list"] if "definition" in each
    )


def thresholds(**more: Any) -> list[tuple[str, float | None]]:
    panel = Panel("t", "d.", "short", (Query("x", "x"),), **more).to_json(1, 0, 0)
    return [(step["color"], step["value"]) for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]]


def test_thresholds_colour_what_is_bad() -> None:
    assert thresholds() == [("green", None)]
    assert thresholds(warn=1) == [("green", None), ("orange", 1)]
    assert thresholds(warn=1, bad=2) == [("green", None), ("orange", 1), ("red", 2)]
    assert thresholds(warn=0.8, bad=0.6, falling=True) == [("red", None), ("orange", 0.6), ("green", 0.8)]


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda each: each.name)
def test_grafanas_own_library_reads_it(dashboard: Dashboard) -> None:
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard", reason="pip install grafana-foundation-sdk")
    data = dashboard.to_json()
    read = models.Dashboard.from_json(data)
    assert (read.title, len(read.panels), len(read.templating.list_val)) == (
        data["title"],
        len(data["panels"]),
        len(data["templating"]["list"]),
    )
