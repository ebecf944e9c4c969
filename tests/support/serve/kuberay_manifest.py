"""The manifest for KubeRay that ships, taken apart."""

from __future__ import annotations

from typing import Any

import yaml

from tests.support.serve.shipped_configs import CONFIGS

KUBERAY = CONFIGS / "kuberay"
NAME = "kuberay/qwen3-30b-a3b.yaml"


def resources() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CONFIGS / NAME).read_text()))


def cluster_of(service: dict[str, Any]) -> dict[str, Any]:
    return service["spec"]["rayClusterConfig"]


def pods_of(service: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod specs of the head and of the one group of workers."""
    [group] = cluster_of(service)["workerGroupSpecs"]
    return [cluster_of(service)["headGroupSpec"]["template"]["spec"], group["template"]["spec"]]
