"""Write configs/monitoring/grafana/dashboards, and the alerts in the form that the Prometheus operator takes.

python -m cluster.observability.dashboards
"""

from __future__ import annotations

import json
from pathlib import Path

from cluster.observability.dashboards.mesh import MESH
from cluster.observability.dashboards.service import SERVICE
from cluster.observability.dashboards.shards import SHARDS_PAGE

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
DASHBOARDS = (SERVICE, MESH, SHARDS_PAGE)

_RULE = """# Made by `python -m cluster.observability.dashboards` of configs/monitoring/rules.yaml: do not edit.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: expertmesh
spec:
"""


def files() -> dict[Path, str]:
    """Text by path."""
    folder = CONFIGS / "monitoring/grafana/dashboards"
    found = {folder / f"{each.name}.json": json.dumps(each.to_json(), indent=1) + "\n" for each in DASHBOARDS}
    rules = (CONFIGS / "monitoring/rules.yaml").read_text()
    found[CONFIGS / "kuberay/monitoring/rules.yaml"] = _RULE + "".join(
        f"  {line}" for line in rules.splitlines(keepends=True) if not line.startswith("#")
    )
    return found


if __name__ == "__main__":
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(path)
