"""The page of all series, docs/metrics.md, from the tables that export them.

python -m cluster.observability.reference > docs/metrics.md
"""

from __future__ import annotations

from typing import Any

from cluster.observability.controller_series import CONTROLLER_SERIES
from cluster.observability.gateway_series import GATEWAY_SERIES
from cluster.observability.key_series import KEY_SERIES
from cluster.observability.router_series import ROUTER_SERIES
from cluster.observability.series import Series
from cluster.observability.shard_series import SHARD_SERIES

SECTIONS: dict[str, tuple[Series[Any], ...]] = {
    "Routers": ROUTER_SERIES,
    "Shards": SHARD_SERIES,
    "Controller, placement and migration": CONTROLLER_SERIES,
    "Keys": KEY_SERIES,
    "Versions of models (the gateway)": GATEWAY_SERIES,
}

_HEAD = """# Metrics

Made by `python -m cluster.observability.reference`; a test keeps it true.

Every process hands its series to Ray's metrics agent on its node, the one exporter. Serve's own series (`ray_serve_*`)
and vLLM's (`ray_vllm_*`, by Ray Serve LLM's `log_engine_metrics`) come from the same port. How to scrape it:
[monitoring.md](monitoring.md). Alerts are in `configs/monitoring/rules.yaml`, with [runbooks](runbooks.md).

Names follow Prometheus: base units (`_seconds`, `_bytes`), `_total` for counters. Beside the labels below every series
has those of Serve (`application`, `deployment`, and `replica`, which is a router's id) and those of Ray (`SessionName`,
`NodeAddress`, `WorkerId`). Counters begin at 0 with their process. The agent forgets a gauge that was not set for 20 s,
such as those of a process that has gone; vLLM sets its own in steps alone, so an idle router has none of them."""


def page() -> str:
    """Markdown: a table for each part of the service."""
    lines = [_HEAD]
    for title, table in SECTIONS.items():
        lines += [f"\n## {title}\n", "| series | type | labels | |", "|---|---|---|---|"]
        for series in table:
            labels = ", ".join(f"`{label}`" for label in series.labels)
            lines.append(f"| `{series.exported_name}` | {series.kind} | {labels} | {series.description} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
