"""What the manifest for KubeRay promises: a pod for each replica, drains, memory, keys, and no needless restarts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import parse as parse_module
from cluster.config.llm_sections import DeadlinesSection
from cluster.config.serve_file import MeshConfig
from cluster.serve_environment import ENVIRONMENT
from tests.support.serve.kuberay_manifest import KUBERAY, NAME, cluster_of, pods_of, resources
from tests.support.serve.shipped_configs import CONFIGS, flat, ray_service, serve_config


@pytest.fixture
def service() -> dict[str, Any]:
    return ray_service(NAME)


def test_it_serves_what_the_config_that_it_stands_for_serves() -> None:
    """All differences are these, and serve.yaml gives the reason for each."""
    plain, ours = flat(serve_config("qwen3-30b-a3b-4gpu.yaml")), flat(serve_config(NAME))
    assert {path for path in plain.keys() | ours.keys() if plain.get(path) != ours.get(path)} == {
        "applications.experts.args.shards.ray_actor_options.accelerator_type",
        "applications.experts.args.controller.ray_actor_options.num_cpus",
        "applications.experts.args.mesh.secret_env",
        "applications.llm.args.routers.accelerator_type",
        "applications.llm.args.routers.deployment_config.max_surge_percent",
        "applications.llm.args.routers.deployment_config.graceful_shutdown_timeout_s",
        "applications.llm.args.deadlines.membership_s",
        "applications.llm.args.http.keys_file",
        "applications.console.args.http.keys_file",
    }


def test_the_file_that_people_edit_passes_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parse_module, "find_path", lambda value, where, folder: Path(value))
    mesh = MeshConfig.from_file(KUBERAY / "qwen3-30b-a3b/serve.yaml")
    assert mesh.serve["applications"][0]["name"] == "experts"
    names = {each["name"] for spec in pods_of(ray_service(NAME)) for each in spec["containers"][0]["env"]}
    assert mesh.experts.mesh.secret_env in names, "in both pods: the controller may be on either"


def test_every_router_and_shard_has_a_pod_and_one_more_may_come(
    service: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parse_module, "find_path", lambda value, where, folder: Path(value))
    mesh = MeshConfig.from_serve_config(serve_config(NAME), source=NAME)
    [group] = cluster_of(service)["workerGroupSpecs"]
    pods = mesh.num_shards + (mesh.llm.routers.count or 1)
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (pods, pods, pods + 1)
    [container] = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    [budget] = [each["spec"] for each in resources() if each["kind"] == "PodDisruptionBudget"]
    assert budget["minAvailable"] == pods - 1, "a number: KubeRay's pods have no kind that scales"
    assert "maxUnavailable" not in budget
    assert budget["selector"]["matchLabels"].items() <= group["template"]["metadata"]["labels"].items()
    cpus = float(container["resources"]["limits"]["cpu"])
    [bundle] = mesh.llm.routers.placement_group_config["bundles"] if mesh.llm.routers.placement_group_config else [{}]
    assert max(bundle["CPU"], mesh.experts.shards.ray_actor_options["num_cpus"]) < cpus, "room for the console"


def test_an_upgrade_starts_all_shards_before_it_moves_traffic(service: dict[str, Any]) -> None:
    """Serve starts a part of each deployment for a part of the capacity, and a part of the shards lacks experts."""
    assert service["spec"]["upgradeStrategy"]["clusterUpgradeOptions"]["maxSurgePercent"] == 100


def test_nothing_that_serves_is_on_the_head(service: dict[str, Any]) -> None:
    assert cluster_of(service)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert service["spec"]["excludeHeadPodFromServeSvc"] is True
    for app in serve_config(NAME)["applications"]:
        for options in re.findall(r"'num_cpus': ([\d.]+)", str(app["args"])):
            assert float(options) > 0, "an actor that needs no CPU may be put on the head"
    assert "controller" in serve_config(NAME)["applications"][0]["args"], "by default it needs none"


def test_a_pod_that_stops_has_time_to_drain(service: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parse_module, "find_path", lambda value, where, folder: Path(value))
    mesh = MeshConfig.from_serve_config(serve_config(NAME), source=NAME)
    _, worker = pods_of(service)
    command, limit_s = worker["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    images = [path.read_text() for path in (CONFIGS / "images").glob("*.Dockerfile")]
    assert all(f"COPY configs/images/drain.sh /usr/local/bin/{command}" in text for text in images)
    of_router_s = mesh.llm.routers.deployment_config.get("graceful_shutdown_timeout_s", 600)
    assert of_router_s <= int(limit_s) < worker["terminationGracePeriodSeconds"]
    assert service["spec"]["rayClusterDeletionDelaySeconds"] >= of_router_s


def gigabytes(quantity: str) -> float:
    match = re.fullmatch(r"(\d+)(Gi|)", quantity)
    assert match is not None, quantity
    return int(match[1]) * (2**30 if match[2] else 1) / 1e9


def test_the_object_store_fits_shared_memory_and_that_the_pod(service: dict[str, Any]) -> None:
    groups = [cluster_of(service)["headGroupSpec"], *cluster_of(service)["workerGroupSpecs"]]
    for group in groups:
        spec = group["template"]["spec"]
        [shm] = [each["emptyDir"] for each in spec["volumes"] if each["name"] == "shm"]
        [mount] = [each for each in spec["containers"][0]["volumeMounts"] if each["name"] == "shm"]
        assert mount["mountPath"] == "/dev/shm"
        assert shm["medium"] == "Memory"
        store_gb = gigabytes(group["rayStartParams"]["object-store-memory"])
        assert (
            store_gb < gigabytes(shm["sizeLimit"]) < gigabytes(spec["containers"][0]["resources"]["limits"]["memory"])
        )


def test_every_pod_has_the_image_the_keys_and_what_serve_reads(service: dict[str, Any]) -> None:
    files = {app["args"]["http"]["keys_file"] for app in serve_config(NAME)["applications"][1:]}
    [file] = files
    for spec in pods_of(service):
        [container] = spec["containers"]
        assert re.search(r":[\w.-]+$|@sha256:", container["image"]), "a pinned image"
        variables = {each["name"]: each.get("value") for each in container["env"]}
        assert ENVIRONMENT.items() <= variables.items()
        [folder] = [each for each in container["volumeMounts"] if each["name"] == "keys"]
        assert str(Path(file).parent) == folder["mountPath"]
        assert "subPath" not in folder, "a change of the Secret would not reach it"
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 1000, "the user of configs/images"


def test_requests_reach_a_pod_after_the_first_token(service: dict[str, Any]) -> None:
    _, worker = pods_of(service)
    [container] = worker["containers"]
    probe, port = container["readinessProbe"], serve_config(NAME)["http_options"]["port"]
    assert probe["httpGet"] == {"path": "/ready", "port": port}
    assert probe["timeoutSeconds"] > DeadlinesSection().probe_s, "the first answer generates a token"
    assert {"containerPort": port, "name": "serve"} in container["ports"]
    assert "livenessProbe" not in container, "no pod of a shard is restarted because a router is away"


def test_prometheus_asks_every_pods_metrics_agent(service: dict[str, Any]) -> None:
    """One way out of the cluster, and without a key."""
    monitors = [each for each in resources() if each["apiVersion"].startswith("monitoring.coreos.com")]
    assert [each["kind"] for each in monitors] == ["PodMonitor"]
    [of_pods] = monitors[0]["spec"]["podMetricsEndpoints"]
    assert "authorization" not in of_pods
    [job] = yaml.safe_load((CONFIGS / "monitoring/prometheus.yaml").read_text())["scrape_configs"]
    [target] = job["static_configs"][0]["targets"]
    groups = [cluster_of(service)["headGroupSpec"], *cluster_of(service)["workerGroupSpecs"]]
    for group, spec in zip(groups, pods_of(service), strict=True):
        ports = {each["name"]: each["containerPort"] for each in spec["containers"][0]["ports"]}
        assert f":{ports[of_pods['port']]}" in target, "KubeRay has Ray's agent listen on 8080"
        labels = group["template"]["metadata"]["labels"]
        assert monitors[0]["spec"]["selector"]["matchLabels"].items() <= labels.items()
