"""A shard on a GPU has run every program that requests will need. A CPU kernel stands in for the GPU's."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from experts.shard.device_order import DeviceOrder
from experts.shard.loop import ShardLoop, telling_sizes
from experts.transports.shm import ShmDoorbell

HIDDEN = 8


def tuned_sizes() -> set[frozenset[int]]:
    """The sets of row counts that vLLM's tuned tiles are given for, one for each of its files."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("vllm, whose tuned sizes are looked at, is not installed")
    folder = Path(found.origin).parent / "model_executor/layers/fused_moe/configs"
    files = [json.loads(path.read_text()) for path in folder.glob("E=*.json")]
    return {frozenset(int(key) for key in file if key.isdigit()) for file in files}


@pytest.mark.parametrize("most", [1, 2, 7, 100, 3000, 16384])
def test_sizes_meet_every_tile_that_vllm_would_choose(most: int) -> None:
    sizes = telling_sizes(most)
    assert sizes == sorted(sizes)
    assert sizes[-1] == most
    all_sets = tuned_sizes()
    assert all_sets
    for tuned in all_sets:
        ordered = sorted(tuned)

        def nearest(pairs: int, ordered: list[int] = ordered) -> int:
            return min(ordered, key=lambda key: abs(key - pairs))

        assert {nearest(size) for size in sizes} == {nearest(pairs) for pairs in range(1, most + 1)}


class NotingKernel:
    """Has no slots and notes what it was called with."""

    layout = "noted"

    def __init__(self) -> None:
        self.shape = SimpleNamespace(device="cpu")
        self.calls: list[tuple[int, int]] = []
        self.loaded: list[bool] = []

    def compiled_forward(self) -> None:
        return None

    def finish_write(self, layer: int, slot: int) -> None:
        self.loaded.append(True)

    def begin_write(self, layer: int, slot: int) -> None:
        self.loaded.append(False)

    def forward(self, layer: int, rows_MD: Any, offsets_M1: Any, slots_N: Any, weights_N: Any, out_MD: Any) -> None:
        assert self.loaded[-1:] == [True]
        assert rows_MD.shape == out_MD.shape == (len(offsets_M1) - 1, HIDDEN)
        assert offsets_M1.dtype == slots_N.dtype == torch.int32
        assert offsets_M1[0] == 0
        assert offsets_M1[-1] == len(slots_N) == len(weights_N)
        assert (offsets_M1.diff() > 0).all()
        self.calls.append((len(rows_MD), len(slots_N)))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_a_gpu_runs_all_sizes(device: str) -> None:
    kernel: Any = NotingKernel()
    spec = SimpleNamespace(hidden_size=HIDDEN)
    slots: Any = SimpleNamespace(
        checkpoint=SimpleNamespace(spec=spec), slot_of_expert_LE=np.full((1, 4), -1, np.int32), order=DeviceOrder()
    )
    loop = ShardLoop(slots, kernel, ShmDoorbell(0), torch.float32, 1, compiled=False, top_k=3, device=device)
    loop.warm_up(5)
    if device == "cpu":
        assert kernel.calls == [(1, 1)]
    else:
        assert kernel.calls == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (5, 8), (5, 12), (5, 15)]
    assert kernel.loaded == [True, False], "the slot of zeros is given back"
