"""Ray's own node autoscaler on one machine: its fake provider starts raylets as nodes.

`ray.cluster_utils.AutoscalingCluster` does the same, but begins with `ray stop --force`, which ends other clusters of
the machine, and reads a file that Ray's wheel lacks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ENVIRONMENT = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}

# The schema wants them.
UNUSED = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter"),
)


def write_config(path: Path, gcs_address: str, head: Mapping[str, float], node: Mapping[str, float], most: int) -> Path:
    """A file for `ray start --head --autoscaling-config`: beside the head up to `most` nodes with resources `node`."""
    lists: dict[str, Any] = {key: [] for key in UNUSED}
    config = {
        **lists,
        "cluster_name": "nodes-on-demand",
        "max_workers": most,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.1,
        "docker": {},
        "auth": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": gcs_address,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": dict(head), "node_config": {}, "max_workers": 0},
            "node": {"resources": dict(node), "node_config": {}, "min_workers": 0, "max_workers": most},
        },
    }
    path.write_text(json.dumps(config))
    return path
