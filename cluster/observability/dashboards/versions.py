"""What a gateway tells of each version of a model: whether a canary does worse than what it is to replace."""

from __future__ import annotations

from cluster.observability.dashboards.model import Panel, Query, Row
from cluster.observability.dashboards.queries import OURS, max_by, rate_by

NO_GATEWAY = "there is no gateway"
_BY, _LEGEND = "model, version", "{{model}} {{version}}"


def _rate(name: str) -> str:
    return rate_by(_BY, f"ray_expertmesh_version_{name}_total", OURS)


VERSIONS = Row(
    "Versions of models",
    (
        Panel(
            "Requests by version",
            "As the gateway splits them.",
            "reqps",
            (Query(_rate("requests"), _LEGEND),),
            stacked=True,
            may_be_empty=NO_GATEWAY,
        ),
        Panel(
            "Failed by version",
            "A status from 500 on, no router, or an answer that broke off.",
            "reqps",
            (Query(_rate("errors"), _LEGEND),),
            may_be_empty=NO_GATEWAY,
        ),
        Panel(
            "Times by version",
            "Means to the beginning of an answer, and to the end of a request.",
            "s",
            (
                Query(f"{_rate('first_byte_seconds')} / {_rate('answers')}", f"{_LEGEND} begins"),
                Query(f"{_rate('duration_seconds')} / {_rate('requests')}", f"{_LEGEND} ends"),
            ),
            may_be_empty=NO_GATEWAY,
        ),
        Panel(
            "Without an answer",
            "Attempts at a router that gave none, and requests that another version took over.",
            "reqps",
            (
                Query(_rate("retries"), f"{_LEGEND} tried again"),
                Query(_rate("taken_over"), f"{_LEGEND} took over"),
            ),
            may_be_empty=NO_GATEWAY,
        ),
        Panel(
            "Running by version",
            "Requests that the gateway is passing on.",
            "short",
            (Query(max_by(_BY, "ray_expertmesh_version_open_requests", OURS), _LEGEND),),
            stacked=True,
            may_be_empty=NO_GATEWAY,
        ),
    ),
)
