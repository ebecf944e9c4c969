"""What `expertmesh size --offload` predicts of hits, beside what kernels do with the same calls."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experts.kernels import KERNELS
from experts.kernels.offload import OffloadedKernel
from placement.capacity.residency import Offload, Residents
from placement.placement import Placement
from placement.traces.trace import ActivationTrace
from tests.support.offloading import SHAPE, offloaded, set_all

TRACE = ActivationTrace.load_npz(Path(__file__).parents[4] / "examples" / "tiny-moe" / "trace.npz")
L, E = TRACE.num_layers, TRACE.num_experts
NAMES = [name for name in ("native", "torch_loop") if KERNELS[name].supports(SHAPE) is None]
CALLS = 40  # of each layer


def call(kernel: OffloadedKernel, layer: int, slots_U: np.ndarray) -> int:
    """One row that needs these slots; returns how many were waited for."""
    before = kernel.counts.misses
    rows = torch.zeros(1, kernel.shape.hidden_size)
    offsets = torch.tensor([0, len(slots_U)], dtype=torch.int32)
    slots = torch.from_numpy(slots_U.astype(np.int32))
    kernel.forward(layer, rows, offsets, slots, torch.ones(len(slots_U)), torch.empty_like(rows))
    return kernel.counts.misses - before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("fraction", "tokens"), [(0.5, 1), (0.25, 12), (0.1, 6)])
def test_every_call_misses_as_many_as_predicted(name: str, fraction: float, tokens: int) -> None:
    """Two shards that divide the tiny model's experts, each with room for some; its own routing, `tokens` at a time.

    The kernel and the prediction share the rule, so they agree to the last expert, in calls of several parts, too.
    """
    placement, load_LE = Placement.linear(L, E, 2), TRACE.load()
    slots = placement.slots_per_rank
    shape = replace(SHAPE, num_layers=L, num_slots=slots, hidden_size=16, intermediate_size=16)
    kernels = [offloaded(name, math.ceil(fraction * slots), shape) for _ in range(2)]
    for rank, kernel in enumerate(kernels):
        set_all(kernel, shape=shape)
        experts_LS = placement.experts_of_rank(rank)
        kernel.fill(
            (layer, int(slot))
            for layer in range(L)
            for slot in np.argsort(-load_LE[layer, experts_LS[layer]], kind="stable")
        )
    shares = kernels[0].places.shares_places
    residents = Residents(placement, load_LE, Offload(fraction, 1.0, layers_share=shares))
    parts = 0
    for step_TLK in TRACE.topk_ids[: CALLS * tokens].reshape(CALLS, tokens, L, -1):
        for layer in range(L):
            used_RE = np.zeros((2, E), bool)
            expected_R = []
            for rank, kernel in enumerate(kernels):
                experts_S = placement.experts_of_rank(rank)[layer]
                slots_U = np.flatnonzero(np.isin(experts_S, step_TLK[:, layer]))
                used_RE[rank, experts_S[slots_U]] = True
                expected_R.append(call(kernel, layer, slots_U) if slots_U.size else 0)
                parts += len(slots_U) > kernel.most_at_once
            assert residents.use(layer, used_RE[None]).tolist() == [expected_R]
    hits, uses = (sum(values) for values in zip(*((k.hits, k.places.uses) for k in kernels), strict=True))
    assert (residents.uses, residents.misses) == (uses, uses - hits)
    assert 0 < hits < uses
    assert parts or tokens == 1
    for kernel in kernels:
        kernel.close()
