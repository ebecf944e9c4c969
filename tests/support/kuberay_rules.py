"""What KubeRay's operator refuses in a RayService and its schema does not, as far as our manifests can break it.

The facts are those of ray-operator/controllers/ray/utils/validation.go (ValidateRayServiceSpec, ValidateRayClusterSpec)
and of constant.go for the length of names, as of 2026-08. The operator's feature gates count as left at their defaults.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

MAX_NAME = 53 - 6  # a cluster's name has at most 53 characters, six of which the operator appends
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
GO_DURATION = re.compile(r"(\d+(\.\d+)?(ns|us|ms|s|m|h))+|\d+")
STRATEGIES = ("None", "NewCluster", "NewClusterWithIncrementalUpgrade")
RESOURCE_PARAMETERS = {"num-cpus", "num-gpus", "memory", "resources"}


def refusals(service: dict[str, Any]) -> list[str]:
    """One line for each rule that a RayService breaks."""
    spec, metadata = service["spec"], service["metadata"]
    annotations = metadata.get("annotations", {})
    return [
        *_metadata(metadata["name"], annotations),
        *_upgrade(spec),
        *_cluster(spec["rayClusterConfig"], annotations),
    ]


def _metadata(name: str, annotations: dict[str, str]) -> Iterator[str]:
    if len(name) > MAX_NAME or not DNS_1035.fullmatch(name):
        yield f"name {name!r}: at most {MAX_NAME} characters of a DNS-1035 label"
    timeout = annotations.get("ray.io/initializing-timeout")
    if timeout and (not GO_DURATION.fullmatch(timeout) or not re.search("[1-9]", timeout)):
        yield f"ray.io/initializing-timeout {timeout!r}: a positive duration of Go, or whole seconds"


def _upgrade(spec: dict[str, Any]) -> Iterator[str]:
    strategy = spec.get("upgradeStrategy", {})
    if strategy.get("type", "NewCluster") not in STRATEGIES:
        yield f"upgradeStrategy.type {strategy['type']!r}: one of {', '.join(STRATEGIES)}"
    if spec.get("rayClusterDeletionDelaySeconds", 0) < 0:
        yield "rayClusterDeletionDelaySeconds: not negative"
    if spec["rayClusterConfig"].get("upgradeStrategy"):
        yield "rayClusterConfig.upgradeStrategy: only for a RayCluster of one's own"
    if spec["rayClusterConfig"]["headGroupSpec"].get("headService", {}).get("metadata", {}).get("name"):
        yield "headGroupSpec.headService.metadata.name: the operator's to choose"
    if strategy.get("type") != "NewClusterWithIncrementalUpgrade":
        return
    if not spec["rayClusterConfig"].get("enableInTreeAutoscaling"):
        yield "NewClusterWithIncrementalUpgrade: enableInTreeAutoscaling must be true"
    options = strategy.get("clusterUpgradeOptions")
    if options is None:
        yield "NewClusterWithIncrementalUpgrade: needs clusterUpgradeOptions"
        return
    surge, step = options.get("maxSurgePercent", 100), options.get("stepSizePercent", -1)
    if not 0 <= surge <= 100:
        yield "maxSurgePercent: 0 to 100"
    if not 0 <= step <= 100 or step > surge:
        yield "stepSizePercent: 0 to 100, and at most maxSurgePercent"
    if options.get("intervalSeconds", 0) <= 0:
        yield "intervalSeconds: more than 0"
    if not options.get("gatewayClassName"):
        yield "gatewayClassName: must be named"


def _cluster(cluster: dict[str, Any], annotations: dict[str, str]) -> Iterator[str]:
    head = cluster["headGroupSpec"]
    groups = [("head", head), *((group["groupName"], group) for group in cluster.get("workerGroupSpecs", []))]
    scales = cluster.get("enableInTreeAutoscaling", False)
    for name, group in groups:
        yield from _group(name, group)
    for name, group in groups[1:]:
        least, most = group.get("minReplicas"), group.get("maxReplicas")
        if not scales and None in (least, most):
            yield f"{name}: minReplicas and maxReplicas, without an autoscaler"
        if min(least or 0, most or 0) < 0 or (None not in (least, most) and least > most):
            yield f"{name}: 0 <= minReplicas <= maxReplicas"
        if group.get("suspend"):
            yield f"{name}: suspend needs a feature gate"
    yield from _gcs(cluster, annotations)
    yield from _autoscaler(cluster, groups)
    yield from _authentication(cluster)
    if cluster.get("networkPolicy") or cluster.get("tlsOptions") or cluster.get("historyServerOptions"):
        yield "networkPolicy, tlsOptions and historyServerOptions need feature gates"


def _group(name: str, group: dict[str, Any]) -> Iterator[str]:
    if not group["template"]["spec"].get("containers"):
        yield f"{name}: at least one container"
    parameters = group.get("rayStartParams", {})
    if group.get("resources") and RESOURCE_PARAMETERS & parameters.keys():
        yield f"{name}: resources in rayStartParams or in resources, not in both"
    if "labels" in parameters:
        yield f"{name}: labels is a field of the group, not of rayStartParams"
    for key, value in group.get("labels", {}).items():
        if not LABEL_VALUE.fullmatch(value):
            yield f"{name}: label {key} has the value {value!r}"


def _gcs(cluster: dict[str, Any], annotations: dict[str, str]) -> Iterator[str]:
    options, head = cluster.get("gcsFaultToleranceOptions"), cluster["headGroupSpec"]
    parameters = head.get("rayStartParams", {})
    environment = _environment(head)
    if "redis-username" in parameters or "REDIS_USERNAME" in environment:
        yield "the user of Redis: only in gcsFaultToleranceOptions.redisUsername"
    if options is None:
        if "RAY_REDIS_ADDRESS" in environment and annotations.get("ray.io/ft-enabled") != "true":
            yield "RAY_REDIS_ADDRESS: needs gcsFaultToleranceOptions"
        return
    if annotations.get("ray.io/ft-enabled") or annotations.get("ray.io/external-storage-namespace"):
        yield "gcsFaultToleranceOptions: without the annotations that came before it"
    if parameters.get("redis-password") or {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS"} & environment.keys():
        yield "the address and password of Redis: only in gcsFaultToleranceOptions"
    if options.get("backend", "redis") != "redis":
        yield "gcsFaultToleranceOptions.backend: rocksdb needs a feature gate"
    elif options.get("storage"):
        yield "gcsFaultToleranceOptions.storage: only for rocksdb"
    elif not options.get("redisAddress"):
        yield "gcsFaultToleranceOptions.redisAddress: nothing is kept without it"


def _autoscaler(cluster: dict[str, Any], groups: list[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    options, environment = cluster.get("autoscalerOptions", {}), _environment(cluster["headGroupSpec"])
    by_variable = environment.get("RAY_enable_autoscaler_v2")
    if not cluster.get("enableInTreeAutoscaling"):
        if by_variable in ("1", "true"):
            yield "RAY_enable_autoscaler_v2: needs enableInTreeAutoscaling"
    elif options.get("version") and by_variable is not None:
        yield "autoscalerOptions.version or RAY_enable_autoscaler_v2, not both"
    elif options.get("version") == "v2" or by_variable in ("1", "true"):
        for name, group in groups:
            if group["template"]["spec"].get("restartPolicy", "Never") != "Never":
                yield f"{name}: restartPolicy Never, with autoscaler v2"
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield "autoscalerOptions.idleTimeoutSeconds: not negative"
    for name, group in groups[1:]:
        if group.get("idleTimeoutSeconds") is not None and options.get("version") != "v2":
            yield f"{name}: idleTimeoutSeconds of a group needs autoscaler v2"


def _authentication(cluster: dict[str, Any]) -> Iterator[str]:
    options = cluster.get("authOptions", {})
    if options.get("mode") == "token":
        version = tuple(int(part) for part in re.findall(r"\d+", cluster.get("rayVersion", ""))[:3])
        if version < (2, 52, 0):
            yield "authOptions.mode token: rayVersion of at least 2.52.0"
    if options.get("enableK8sTokenAuth"):
        yield "authOptions.enableK8sTokenAuth: not for a RayService"


def _environment(group: dict[str, Any]) -> dict[str, Any]:
    return {each["name"]: each.get("value") for each in group["template"]["spec"]["containers"][0].get("env", [])}
