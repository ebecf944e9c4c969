"""The configs that ship, and published facts of the models they serve."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).parents[3] / "configs"


@dataclass(frozen=True)
class Shape:
    """Published facts of a model; `dense_gb` is what a router holds, in GB."""

    layers: int
    experts: int
    hidden: int
    width: int
    dense_gb: float
    num_gpus: int


SHAPES = {
    "mixtral-8x7b-2gpu.yaml": Shape(32, 8, 4096, 14336, 3.2, 2),
    "qwen3-30b-a3b-4gpu.yaml": Shape(48, 128, 2048, 768, 3.1, 4),
    "deepseek-v3-16gpu.yaml": Shape(58, 256, 7168, 2048, 17.0, 16),
    "gpt-oss-120b-2gpu.yaml": Shape(36, 128, 2880, 2880, 4.3, 2),
    "kuberay/qwen3-30b-a3b.yaml": Shape(48, 128, 2048, 768, 3.1, 4),
    "anyscale/qwen3-30b-a3b.yaml": Shape(48, 128, 2048, 768, 3.1, 4),
}


def serve_config(name: str) -> dict[str, Any]:
    """The Serve config inside a file of any kind: plain, KubeRay or Anyscale."""
    data = yaml.safe_load((CONFIGS / name).read_text())
    return yaml.safe_load(data["spec"]["serveConfigV2"]) if data.get("kind") == "RayService" else data
