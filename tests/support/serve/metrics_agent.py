"""What Ray's metrics agents of a running service say."""

from __future__ import annotations

import json
import urllib.request
from collections import defaultdict
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.support.serve.service import Service


def targets_file(service: Service) -> Path:
    """Where Ray lists them for Prometheus."""
    return service.folder / "ray" / "prom_metrics_service_discovery.json"


def totals_of(service: Service) -> dict[str, float]:
    """Values of this project's series by name, added up over labels; empty before the agents are listed."""
    if not targets_file(service).exists():
        return {}
    totals: defaultdict[str, float] = defaultdict(float)
    for target in [each for group in json.loads(targets_file(service).read_text()) for each in group["targets"]]:
        try:
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as response:
                text = response.read().decode()
        except OSError:
            continue  # one of the listed ports is of Ray's autoscaler, which may not run
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith("ray_expertmesh_"):
                    totals[sample.name] += sample.value
    return totals
