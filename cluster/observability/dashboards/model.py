"""What a dashboard is made of, and its JSON as Grafana provisions it (schema version 39, Grafana 10.4 and later)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

SCHEMA_VERSION = 39
COLUMNS = 24  # of Grafana's grid
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
TAG = "expertmesh"
Kind = Literal["timeseries", "stat"]


@dataclass(frozen=True)
class Query:
    """One PromQL expression; `legend` may name labels as {{label}}."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One graph or figure.

    `unit` is one of Grafana's. `warn` and `bad` colour values from there on, or, with `falling`, from there down.
    """

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: Kind = "timeseries"
    warn: float | None = None
    bad: float | None = None
    falling: bool = False
    stacked: bool = False
    most: float | None = None  # end of the axis
    may_be_empty: str = ""  # why a sound service may have no data here

    @property
    def size(self) -> tuple[int, int]:
        """(columns, rows) of the grid."""
        return (4, 4) if self.kind == "stat" else (8, 8)

    def to_json(self, number: int, x: int, y: int) -> dict[str, Any]:
        """The panel at a place of the grid."""
        width, height = self.size
        defaults: dict[str, Any] = {"unit": self.unit, "min": 0, "thresholds": self._thresholds()}
        if self.most is not None:
            defaults["max"] = self.most
        if self.kind == "stat":
            defaults["color"] = {"mode": "thresholds"}
            options: dict[str, Any] = {
                "colorMode": "background_solid" if self.warn is not None else "none",
                "graphMode": "area",
                "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
                "textMode": "value_and_name" if len(self.queries) > 1 else "value",
            }
        else:
            defaults["color"] = {"mode": "palette-classic"}
            defaults["custom"] = {
                "drawStyle": "line",
                "fillOpacity": 40 if self.stacked else 8,
                "lineWidth": 1,
                "showPoints": "never",
                "spanNulls": 60_000,  # milliseconds: a scrape that is missing leaves no hole
                "stacking": {"mode": "normal" if self.stacked else "none", "group": "A"},
                "thresholdsStyle": {"mode": "off" if self.warn is None else "dashed"},
            }
            options = {
                "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"]},
                "tooltip": {"mode": "multi", "sort": "desc"},
            }
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.description,
            "datasource": DATASOURCE,
            "gridPos": {"x": x, "y": y, "w": width, "h": height},
            "fieldConfig": {"defaults": defaults, "overrides": []},
            "options": options,
            "targets": [
                {
                    "refId": chr(ord("A") + index),
                    "datasource": DATASOURCE,
                    "editorMode": "code",
                    "expr": query.expr,
                    "legendFormat": query.legend,
                    "range": True,
                }
                for index, query in enumerate(self.queries)
            ],
        }

    def _thresholds(self) -> dict[str, Any]:
        steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
        if self.falling:
            below = [("red", None), ("orange", self.bad), ("green", self.warn)]
            steps = [{"color": color, "value": value} for color, value in below if color == "red" or value is not None]
        else:
            above = [("orange", self.warn), ("red", self.bad)]
            steps += [{"color": color, "value": value} for color, value in above if value is not None]
        return {"mode": "absolute", "steps": steps}


@dataclass(frozen=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Variable:
    """A choice above the panels: values of a label, all of them by default."""

    name: str
    label: str
    query: str

    def to_json(self) -> dict[str, Any]:
        """As Grafana's templating has it."""
        return {
            "name": self.name,
            "label": self.label,
            "type": "query",
            "datasource": DATASOURCE,
            "query": {"query": self.query, "refId": self.name},
            "definition": self.query,
            "refresh": 2,  # with the time range
            "includeAll": True,
            "multi": True,
            "allValue": ".*",  # also where the label is missing
            "current": {"text": ["All"], "value": ["$__all"]},
            "sort": 3,  # as numbers
        }


_EPOCHS = '__name__=~"ray_expertmesh_epoch|ray_expertmesh_controller_epoch"'
NAMESPACE = Variable("namespace", "Namespace", f"label_values({{{_EPOCHS}}}, namespace)")
APPLICATION = Variable(
    "application", "Application", f'label_values({{{_EPOCHS}, namespace=~"$namespace"}}, application)'
)
ROUTER = Variable(
    "router",
    "Router",
    'label_values(ray_expertmesh_steps_total{namespace=~"$namespace", application=~"$application"}, replica)',
)
RANK = Variable(
    "rank",
    "Rank",
    'label_values(ray_expertmesh_rank_state{namespace=~"$namespace", application=~"$application"}, rank)',
)


@dataclass(frozen=True)
class Dashboard:
    """One page."""

    name: str  # of the file and in the address
    title: str
    description: str
    variables: tuple[Variable, ...]
    rows: tuple[Row, ...]

    def panels(self) -> Iterator[Panel]:
        """All of them, from the top."""
        for row in self.rows:
            yield from row.panels

    def to_json(self) -> dict[str, Any]:
        """As a file that Grafana provisions."""
        return {
            "uid": f"expertmesh-{self.name}",
            "title": self.title,
            "description": self.description,
            "tags": [TAG],
            "schemaVersion": SCHEMA_VERSION,
            "editable": False,
            "refresh": "15s",
            "time": {"from": "now-1h", "to": "now"},
            "timezone": "browser",
            "graphTooltip": 1,  # one cursor for all panels
            "links": [
                {
                    "type": "dashboards",
                    "title": "expertmesh",
                    "tags": [TAG],
                    "asDropdown": False,
                    "keepTime": True,
                    "includeVars": True,
                }
            ],
            "annotations": {"list": []},
            "templating": {"list": [_DATASOURCE_CHOICE, *(variable.to_json() for variable in self.variables)]},
            "panels": list(self._placed()),
        }

    def _placed(self) -> Iterator[dict[str, Any]]:
        number, y = 0, 0
        for row in self.rows:
            number += 1
            place = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
            yield {"id": number, "type": "row", "title": row.title, "collapsed": False, "gridPos": place, "panels": []}
            x, y, height = 0, y + 1, 0
            for panel in row.panels:
                number += 1
                width, tall = panel.size
                if x + width > COLUMNS:
                    x, y, height = 0, y + height, 0
                yield panel.to_json(number, x, y)
                x, height = x + width, max(height, tall)
            y += height


_DATASOURCE_CHOICE = {
    "name": "datasource",
    "label": "Prometheus",
    "type": "datasource",
    "query": "prometheus",
    "current": {},
    "refresh": 1,
}
