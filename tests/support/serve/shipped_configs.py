"""The configs that ship, and published facts of the models they serve."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).parents[3] / "configs"


@dataclass(frozen=True)
class Shape:
    """Published facts of a model; `dense_gb` is what a router holds, in GB; `gpu` is Ray's name for its GPUs."""

    layers: int
    experts: int
    hidden: int
    width: int
    dense_gb: float
    num_gpus: int
    gpu: str


SHAPES = {
    "mixtral-8x7b-2gpu.yaml": Shape(32, 8, 4096, 14336, 3.2, 2, "H100"),
    "qwen3-30b-a3b-4gpu.yaml": Shape(48, 128, 2048, 768, 3.1, 4, "L4"),
    "deepseek-v3-16gpu.yaml": Shape(58, 256, 7168, 2048, 17.0, 16, "H200"),
    "gpt-oss-120b-2gpu.yaml": Shape(36, 128, 2880, 2880, 4.3, 2, "H200"),
    "kuberay/qwen3-30b-a3b.yaml": Shape(48, 128, 2048, 768, 3.1, 4, "L4"),
    "anyscale/qwen3-30b-a3b.yaml": Shape(48, 128, 2048, 768, 3.1, 4, "L4"),
}


# Files that hold the applications of a service. The parts that kuberay/ makes one of are tested in tests/configs.
SERVED = [path for folder in (".", "kuberay", "anyscale") for path in sorted((CONFIGS / folder).glob("*.yaml"))]


def ray_service(name: str) -> dict[str, Any]:
    """The RayService among the resources of a manifest."""
    [found] = [each for each in yaml.safe_load_all((CONFIGS / name).read_text()) if each["kind"] == "RayService"]
    return found


def serve_config(name: str) -> dict[str, Any]:
    """The Serve config inside a file of any kind: plain, KubeRay or Anyscale."""
    if name.startswith("kuberay/"):
        return yaml.safe_load(ray_service(name)["spec"]["serveConfigV2"])
    return yaml.safe_load((CONFIGS / name).read_text())


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf by its path; items of a list that have names go by them."""
    if isinstance(value, dict) and value:
        return {k: v for name, each in value.items() for k, v in flat(each, f"{path}.{name}").items()}
    if isinstance(value, list) and value:
        named = [each.get("name", index) if isinstance(each, dict) else index for index, each in enumerate(value)]
        return {k: v for name, each in zip(named, value, strict=True) for k, v in flat(each, f"{path}.{name}").items()}
    return {path.removeprefix("."): value}
