"""A service over several hosts (`benchmarks.serving.hosts`): its config, and what it says of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.serve.host_client import HTTP_PORT, Client

ROOT = Path(__file__).resolve().parents[3]
START_TIMEOUT_S = 420.0
PROMPTS = ["def read_lines(path):", "The function returns", "import os", "class Node:"]


def config() -> dict[str, Any]:
    """The applications, pinned by Ray resources: all but the shards run on the host with "router_host"."""
    model = {"id": "tiny-moe", "path": str(ROOT / "examples" / "tiny-moe"), "dtype": "float32"}
    here = {"router_host": 0.01}
    experts = {
        "model": model,
        "shards": {"ray_actor_options": {"num_cpus": 0.25, "resources": {"shard_host": 1}}},
        "controller": {"ray_actor_options": {"num_cpus": 0, "resources": here}},
    }
    deployments = [
        {"name": "ExpertShard", "num_replicas": 2},
        {"name": "PlacementController", "user_config": {"membership": {"lost_after_s": 30}}},
    ]
    llm = {
        "model": model,
        "routers": {
            "engine_kwargs": {"max_model_len": 1024, "max_num_seqs": 8, "enforce_eager": True},
            "placement_group_config": {"bundles": [{"CPU": 0.25, **here}]},
            "deployment_config": {"ray_actor_options": {"num_cpus": 0.25}},
            "env_vars": {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"},
        },
        "deadlines": {"dispatch_ms": 2000, "connect_s": 2},
    }
    console = {"deployment_config": {"ray_actor_options": {"num_cpus": 0.1, "resources": here}}}
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": HTTP_PORT},
        "applications": [
            {
                "name": "experts",
                "route_prefix": None,
                "import_path": "serve_app:build_experts",
                "args": experts,
                "deployments": deployments,
            },
            {"name": "llm", "route_prefix": "/", "import_path": "serve_app:build_llm", "args": llm},
            {
                "name": "console",
                "route_prefix": "/expertmesh",
                "import_path": "serve_app:build_console",
                "args": console,
            },
        ],
    }


def service_status(client: Client) -> dict[str, Any]:
    """/expertmesh/status, as the client's host sees it."""
    code, text = client.ask("get", "/expertmesh/status")
    assert code == 200, text
    return dict(json.loads(text))
