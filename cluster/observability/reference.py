"""The page of all series, docs/metrics.md, from the tables that export them.

python -m cluster.observability.reference > docs/metrics.md
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cluster.mesh.messages import ControllerStatus, MigrationView
from cluster.observability.controller_metrics import controller_families
from cluster.observability.key_metrics import KEY_COUNTERS, KEYS_CURRENT, KeysView, key_families
from cluster.observability.metrics import PREFIX, ROUTER_COUNTERS, ROUTER_GAUGES, SHARD_COUNTERS, router_families

_HEAD = """# Metrics

Made by `python -m cluster.observability.reference`; a test keeps it true.

`GET /expertmesh/metrics` has these series of all routers, of the controller and of keys (those for an admin alone).
Names follow Prometheus: base units (`_seconds`, `_bytes`), `_total` for counters. Routers also hand the series marked *
to Ray's metrics agent, whose names begin with `ray_`. `GET /metrics` has vLLM's own, which begin with `vllm:`.

Alerts on them are in `configs/monitoring/rules.yaml`, with [runbooks](runbooks.md)."""


_OF_RAY = {
    *(series.name for series in (*ROUTER_COUNTERS, *ROUTER_GAUGES)),
    *(series.name for series in SHARD_COUNTERS),
    *(series.name for series in KEY_COUNTERS),
    KEYS_CURRENT[0],
}


def families() -> Iterator[tuple[str, Any]]:
    """(section, family) of every series, without samples."""
    nothing = MigrationView(0, "", "idle", False, False, 0, 0, 0, 0, 0, 0, 0, 0, 0, "")
    nobody = ControllerStatus("", 0, True, [], 0, nothing, {}, [])
    for title, found in (
        ("Routers", router_families([])),
        ("Controller, shards and migration", controller_families(PREFIX, nobody)),
        ("Keys", key_families(PREFIX, KeysView({}, {}))),
    ):
        for family in found:
            yield title, family


def page() -> str:
    """Markdown: a table for each part of the service."""
    lines, section = [_HEAD], ""
    for title, family in families():
        if title != section:
            section = title
            lines += [f"\n## {title}\n", "| series | type | labels | |", "|---|---|---|---|"]
        name = f"{family.name}_total" if family.type == "counter" else family.name
        marked = "*" if family.name.removeprefix(PREFIX) in _OF_RAY else ""
        labels = ", ".join(f"`{label}`" for label in family._labelnames)
        lines.append(f"| `{name}`{marked} | {family.type} | {labels} | {family.documentation} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
