"""The manifests for KubeRay, without a cluster: the definition's schema, the operator's own rules, and each other."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.kuberay_rules import refusals
from tests.support.serve.kuberay_manifest import KUBERAY, NAME, cluster_of, pods_of, resources
from tests.support.serve.shipped_configs import CONFIGS, ray_service
from tests.support.strict_schema import problems, strict, version_schema

DEFINITION = Path(__file__).parent / "data/ray.io_rayservices.yaml.gz"
KUBERNETES = "1.33"
SECRET_FILES = {"keys.yaml": "[]", "mesh-secret": "m" * 64, "redis-password": "p" * 64}


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return strict(version_schema(DEFINITION, "v1"))


@pytest.fixture
def service() -> dict[str, Any]:
    return ray_service(NAME)


def kustomized(folder: Path) -> list[dict[str, Any]]:
    """What `kubectl apply -k` would send."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed; its kustomize makes the manifests")
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture
def prerequisites(tmp_path: Path) -> list[dict[str, Any]]:
    """configs/kuberay/once, with the files that an operator makes."""
    folder = tmp_path / "once"
    shutil.copytree(KUBERAY / "once", folder)
    for name, text in SECRET_FILES.items():
        (folder / name).write_text(text)
    return kustomized(folder)


def test_the_manifest_is_what_its_folder_makes() -> None:
    """Made again with: kubectl kustomize configs/kuberay/qwen3-30b-a3b."""
    assert resources() == kustomized(KUBERAY / "qwen3-30b-a3b")


def test_the_service_is_of_the_schema_and_names_nothing_else(service: dict[str, Any], schema: dict[str, Any]) -> None:
    assert problems(service, schema) == []


def test_the_operator_would_take_it(service: dict[str, Any]) -> None:
    assert refusals(service) == []


def set_at(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of a service: `a.b.0.c` becomes `value`."""

    def change(service: dict[str, Any]) -> None:
        *above, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        at: Any = service
        for part in above:
            at = at[part]
        at[last] = value

    return change


CLUSTER, GROUP = "spec.rayClusterConfig", "spec.rayClusterConfig.workerGroupSpecs.0"
OPTIONS = "spec.upgradeStrategy.clusterUpgradeOptions"


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("spec.serveConfig", "", "serveConfig"),
        (f"{CLUSTER}.headGroupSpec.replicas", 1, "replicas"),
        (f"{GROUP}.template.spec.containers.0.lifeCycle", {}, "lifeCycle"),
        (f"{GROUP}.template.spec.containers.0.readinessProbe.httpGet.pth", "/", "pth"),
        (f"{GROUP}.minReplicas", "4", "not of type"),
        (f"{GROUP}.rayStartParams.num-cpus", 0, "not of type"),
        (f"{CLUSTER}.authOptions.mode", "tokens", "tokens"),
        (f"{GROUP}.template.spec.containers.0.resources.limits.memory", "64 GB", "does not match"),
        (f"{GROUP}.template.spec.volumes.1.name", "models", "a second item"),
        (f"{OPTIONS}.gatewayClass", "istio", "gatewayClass"),
    ],
)
def test_the_schema_finds_a_slip(
    service: dict[str, Any], schema: dict[str, Any], path: str, value: Any, told: str
) -> None:
    set_at(path, value)(service)
    [line] = problems(service, schema)
    assert told in line


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("metadata.name", "a" * 48, "name"),
        ("metadata.name", "9-experts", "name"),
        ("metadata.annotations", {"ray.io/initializing-timeout": "soon"}, "initializing-timeout"),
        ("metadata.annotations", {"ray.io/ft-enabled": "true"}, "annotations"),
        ("spec.upgradeStrategy.type", "Incremental", "upgradeStrategy.type"),
        (f"{OPTIONS}.stepSizePercent", 101, "stepSizePercent"),
        (f"{OPTIONS}.maxSurgePercent", 5, "stepSizePercent"),
        (f"{OPTIONS}.intervalSeconds", 0, "intervalSeconds"),
        (f"{OPTIONS}.gatewayClassName", "", "gatewayClassName"),
        ("spec.upgradeStrategy.clusterUpgradeOptions", None, "clusterUpgradeOptions"),
        (f"{CLUSTER}.enableInTreeAutoscaling", False, "enableInTreeAutoscaling"),
        (f"{CLUSTER}.rayVersion", "2.51.2", "2.52.0"),
        (f"{CLUSTER}.gcsFaultToleranceOptions.redisAddress", "", "redisAddress"),
        (f"{CLUSTER}.headGroupSpec.rayStartParams.redis-password", "x", "password"),
        (f"{CLUSTER}.headGroupSpec.resources", {"CPU": "0"}, "not in both"),
        (f"{GROUP}.rayStartParams.labels", "a=b", "labels"),
        (f"{GROUP}.template.spec.restartPolicy", "Always", "restartPolicy"),
        (f"{GROUP}.maxReplicas", 3, "maxReplicas"),
        (f"{GROUP}.template.spec.containers", [], "container"),
        (f"{CLUSTER}.networkPolicy", {"mode": "DenyAll"}, "feature gates"),
    ],
)
def test_a_rule_of_the_operator_finds_a_slip(service: dict[str, Any], path: str, value: Any, told: str) -> None:
    set_at(path, value)(service)
    assert any(told in line for line in refusals(service))


def test_core_kinds_are_of_their_schemas(prerequisites: list[dict[str, Any]]) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate (cpu.lock has it)")
    core = [each for each in [*resources(), *prerequisites] if "." not in each["apiVersion"].partition("/")[0]]
    kinds = {each["kind"] for each in [*core]}
    assert {"Secret", "Service", "StatefulSet", "Job", "PersistentVolumeClaim", "PodDisruptionBudget"} <= kinds
    for each in core:
        validate.validate(each, KUBERNETES, strict=True)
    slip = copy.deepcopy(next(each for each in core if each["kind"] == "Job"))
    slip["spec"]["template"]["spec"]["restartpolicy"] = "Never"
    with pytest.raises(validate.ValidationError):
        validate.validate(slip, KUBERNETES, strict=True)


def test_pods_are_of_the_core_schema_too(service: dict[str, Any]) -> None:
    """KubeRay's schema repeats it at one version; the server that runs the pods has its own."""
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate (cpu.lock has it)")
    for spec in pods_of(service):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
        validate.validate(pod, KUBERNETES, strict=True)


def references(value: Any) -> set[tuple[str, str]]:
    """(name, key) of every key of a Secret that a resource needs; the key is empty where it mounts all of them."""
    found = set()
    if isinstance(value, list):
        return {pair for each in value for pair in references(each)}
    if isinstance(value, dict):
        for name, each in value.items():
            if name in ("secretKeyRef", "credentials") and not each.get("optional"):
                found.add((each["name"], each["key"]))
            elif name == "secret" and "secretName" in each:
                found.add((each["secretName"], ""))
            else:
                found |= references(each)
    return found


def test_secrets_and_volumes_that_it_names_are_made_once(prerequisites: list[dict[str, Any]]) -> None:
    made = {
        (each["metadata"]["name"], key) for each in prerequisites if each["kind"] == "Secret" for key in each["data"]
    }
    made |= {(name, "") for name, _ in made}
    needed = references(resources()) | references([each for each in prerequisites if each["kind"] != "Secret"])
    assert needed <= made
    claims = {each["metadata"]["name"] for each in prerequisites if each["kind"] == "PersistentVolumeClaim"}
    for spec in pods_of(ray_service(NAME)):
        [claim] = [
            each["persistentVolumeClaim"]["claimName"] for each in spec["volumes"] if "persistentVolumeClaim" in each
        ]
        assert claim in claims
    [redis] = [each for each in prerequisites if each["kind"] == "Service"]
    address = cluster_of(ray_service(NAME))["gcsFaultToleranceOptions"]["redisAddress"]
    assert address == f"redis://{redis['metadata']['name']}:{redis['spec']['ports'][0]['port']}"


def test_git_never_sees_the_secrets() -> None:
    ignored = (CONFIGS.parent / ".gitignore").read_text().splitlines()
    assert {f"configs/kuberay/once/{name}" for name in SECRET_FILES} <= set(ignored)


def test_five_values_and_the_config_make_a_service_of_one_s_own(tmp_path: Path, schema: dict[str, Any]) -> None:
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    own = tmp_path / "kuberay/own"
    shutil.copytree(tmp_path / "kuberay/qwen3-30b-a3b", own)
    values = {
        "image": "hub.example.org/moe@sha256:" + "0" * 64,
        "gpu_pods": "9",
        "max_gpu_pods": "12",
        "keep_gpu_pods": "8",
        "gateway_class": "gke-l7",
    }
    shipped = (KUBERAY / "qwen3-30b-a3b/values.env").read_text()
    assert set(re.findall(r"^(\w+)=", shipped, re.MULTILINE)) == set(values)
    (own / "values.env").write_text("".join(f"{name}={value}\n" for name, value in values.items()))
    made = kustomized(own)
    [service] = [each for each in made if each["kind"] == "RayService"]
    [budget] = [each for each in made if each["kind"] == "PodDisruptionBudget"]
    [group] = cluster_of(service)["workerGroupSpecs"]
    assert {spec["containers"][0]["image"] for spec in pods_of(service)} == {values["image"]}
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (9, 9, 12)
    assert budget["spec"]["minAvailable"] == 8
    assert service["spec"]["upgradeStrategy"]["clusterUpgradeOptions"]["gatewayClassName"] == "gke-l7"
    assert service["spec"]["serveConfigV2"] == (own / "serve.yaml").read_text()
    assert problems(service, schema) == refusals(service) == []
    assert not re.search(r"\b(IMAGE|GATEWAY_CLASS|SERVE_CONFIG)\b", str(made)), "no placeholder is left"


def test_the_patches_of_the_page_leave_out_what_they_say(tmp_path: Path, schema: dict[str, Any]) -> None:
    page = (CONFIGS.parent / "docs/kuberay.md").read_text()
    [patches] = re.findall(r"```yaml\n(patches:.*?)```", page, re.DOTALL)
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    folder = tmp_path / "kuberay/qwen3-30b-a3b"
    with (folder / "kustomization.yaml").open("a") as file:
        file.write(patches)
    made = kustomized(folder)
    assert sorted(each["kind"] for each in made) == ["PodDisruptionBudget", "RayService"]
    [service] = [each for each in made if each["kind"] == "RayService"]
    assert service["spec"]["upgradeStrategy"] == {"type": "NewCluster"}
    assert cluster_of(service)["gcsFaultToleranceOptions"]["redisAddress"].startswith("rediss://")
    assert problems(service, schema) == refusals(service) == []


def test_alerts_and_dashboards_are_those_of_the_project() -> None:
    """What `kubectl apply -k configs/kuberay/monitoring` sends."""
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate (cpu.lock has it)")
    made = kustomized(KUBERAY / "monitoring")
    [rule] = [each for each in made if each["kind"] == "PrometheusRule"]
    assert rule["spec"] == yaml.safe_load((CONFIGS / "monitoring/rules.yaml").read_text())
    maps = [each for each in made if each["kind"] == "ConfigMap"]
    found = {}
    for each in maps:
        validate.validate(each, KUBERNETES, strict=True)
        assert each["metadata"]["labels"]["grafana_dashboard"] == "1"
        found |= each["data"]
    folder = CONFIGS / "monitoring/grafana/dashboards"
    assert found == {path.name: path.read_text() for path in folder.iterdir()}
    assert len(maps) + 1 == len(made)
