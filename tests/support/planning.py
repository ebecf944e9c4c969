"""What tests of planning start from: the tiny model's size, sections, shards, and a trace with something to plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cluster.config.live_sections import LiveConfig, PlacementSection
from cluster.config.parse import parse
from cluster.mesh.planning import ModelFacts, ShardsAtHand
from placement.traces.recorder import TraceRecorder

MODEL = ModelFacts(num_layers=4, num_experts=32)


def section(**keys: Any) -> PlacementSection:
    return parse(LiveConfig, {"placement": keys}).placement


def shards(num_ranks: int = 3, slots: int | None = None, num_nodes: int = 1) -> ShardsAtHand:
    return ShardsAtHand(num_ranks, num_nodes, slots)


def trace_file(folder: Path, num_experts: int = 32) -> str:
    """Tokens that pick four neighbours, so that there is something to plan."""
    rng = np.random.default_rng(0)
    first_TL = rng.integers(0, num_experts // 4, (500, 4)) * 4
    recorder = TraceRecorder(4, num_experts, 4, 1000)
    recorder.add((first_TL[:, :, None] + np.arange(4)).astype(np.int16))
    path = folder / f"trace-{num_experts}.npz"
    path.write_bytes(recorder.snapshot().to_bytes())
    return str(path)
