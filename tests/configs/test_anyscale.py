"""The Anyscale service file: keys that their client knows, machines for the config, and what the config says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import parse as parse_module
from cluster.config.serve_file import MeshConfig
from tests.support.serve.shipped_configs import CONFIGS, flat, serve_config

NAME = "anyscale/qwen3-30b-a3b.yaml"
# Fields of ServiceConfig, ComputeConfig and its nodes in the package `anyscale` 0.26.112, whose ServiceConfig.from_yaml
# took the file.
SERVICE = {
    *("name", "project", "cloud", "version_name", "tags", "image_uri", "ray_version", "containerfile", "working_dir"),
    *("registry_login_secret", "env_vars", "py_modules", "excludes", "requirements", "compute_config"),
    *("query_auth_token_enabled", "http_options", "grpc_options", "logging_config", "proxy_location"),
    *("ray_gcs_external_storage_config", "tracing_config", "applications"),
}
COMPUTE = {
    *("cloud", "cloud_resource", "head_node", "worker_nodes", "min_resources", "max_resources", "zones", "flags"),
    *("enable_cross_zone_scaling", "advanced_instance_config", "auto_select_worker_config"),
}
NODE = {"instance_type", "resources", "required_resources", "labels", "required_labels", "flags"}
WORKER = NODE | {"name", "min_nodes", "max_nodes", "market_type"}


@pytest.fixture
def service() -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / NAME).read_text())


def test_it_has_keys_that_anyscale_knows(service: dict[str, Any]) -> None:
    assert service.keys() <= SERVICE
    assert service["compute_config"].keys() <= COMPUTE
    assert service["compute_config"]["head_node"].keys() <= NODE
    for group in service["compute_config"]["worker_nodes"]:
        assert group.keys() <= WORKER


def test_the_image_is_pinned_and_has_this_ray(service: dict[str, Any]) -> None:
    assert re.search(r"@sha256:[0-9a-f]{64}$", service["image_uri"])
    assert not {"containerfile", "requirements", "working_dir"} & service.keys(), "the image has all of it"
    [pinned] = re.findall(r"^ray==(.+)$", (CONFIGS.parent / "requirements/gpu.lock").read_text(), re.MULTILINE)
    assert service["ray_version"] == pinned
    assert f"FROM anyscale/ray:{pinned}-" in (CONFIGS / "anyscale/Containerfile").read_text()


def test_there_is_a_machine_for_every_router_and_shard_and_one_more(
    service: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parse_module, "find_path", lambda value, where, folder: Path(value))
    mesh = MeshConfig.from_serve_config(serve_config(NAME), source=NAME)
    [group] = service["compute_config"]["worker_nodes"]
    machines = mesh.num_shards + (mesh.llm.routers.count or 1)
    assert (group["min_nodes"], group["max_nodes"]) == (machines, machines + 1)
    assert service["compute_config"]["head_node"]["resources"] == {"CPU": 0}, "nothing that serves is put there"
    assert mesh.experts.controller.ray_actor_options["num_cpus"] > 0


def test_one_side_asks_for_keys_and_not_both(service: dict[str, Any]) -> None:
    """Both read the same header."""
    keys = [app["args"].get("http", {}).get("keys_file") for app in service["applications"][1:]]
    assert service["query_auth_token_enabled"] is False
    assert len(set(keys)) == 1
    assert keys[0].startswith("/mnt/shared_storage/")


def test_it_serves_what_the_config_that_it_stands_for_serves() -> None:
    plain, ours = (
        flat(serve_config("qwen3-30b-a3b-4gpu.yaml")["applications"]),
        flat(serve_config(NAME)["applications"]),
    )
    assert {path for path in plain.keys() | ours.keys() if plain.get(path) != ours.get(path)} == {
        "experts.args.model.path",
        "experts.args.controller.ray_actor_options.num_cpus",
        "llm.args.model.path",
        "llm.args.routers.deployment_config.max_surge_percent",
        "llm.args.routers.deployment_config.graceful_shutdown_timeout_s",
        "llm.args.transport.name",
        "llm.args.deadlines.membership_s",
        "llm.args.http.keys_file",
        "console.args.http.keys_file",
    }
