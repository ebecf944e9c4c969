"""What the planner predicts is what a router sends: the tiny model's own routing, through its own shards."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from experts.protocol.wire import exchange_bytes
from placement.policy import build_placement
from placement.rule.evaluate import evaluate
from placement.search.problem import PlanRequest
from placement.traces.trace import ActivationTrace
from tests.support.small_mesh import Mesh, mesh_of

TINY = Path(__file__).parents[3] / "examples" / "tiny-moe"
NUM_SHARDS, BATCH, STEPS = 4, 64, 25
TOLERANCE = 0.02


@pytest.fixture(scope="module")
def halves() -> tuple[ActivationTrace, ActivationTrace]:
    """To plan on, and to serve."""
    return ActivationTrace.load_npz(TINY / "trace.npz").split(seed=0)


@pytest.fixture(scope="module", params=[("linear", 8, 1), ("optimized", 8, 1), ("optimized", 11, 2)], ids=str)
def mesh(request: pytest.FixtureRequest, halves: tuple[ActivationTrace, ActivationTrace]) -> Iterator[Mesh]:
    policy, slots_per_rank, num_nodes = request.param
    plan = PlanRequest(NUM_SHARDS, num_nodes, slots_per_rank, load_cap=1.2, seconds=1.0)
    placement = build_placement(policy, plan, halves[0], halves[0])
    with mesh_of(TINY, placement) as mesh:
        yield mesh


def test_predicted_and_sent_bytes_agree(mesh: Mesh, halves: tuple[ActivationTrace, ActivationTrace]) -> None:
    order = np.random.default_rng(0).permutation(halves[1].num_tokens)  # domains mixed, as the plan has them
    served = halves[1].take(order[: BATCH * STEPS])
    router = mesh.router(trace_tokens=BATCH * STEPS)
    x_TD = torch.randn(BATCH, router.shape.hidden_size)
    weights_TK = torch.full((BATCH, router.shape.top_k), 1 / router.shape.top_k)
    for step in range(STEPS):
        for layer in range(router.shape.num_layers):
            ids_TK = torch.from_numpy(served.topk_ids[step * BATCH :][:BATCH, layer].astype(np.int32))
            router.finish(router.begin(layer, x_TD, weights_TK, ids_TK))
    status = router.status()
    recorded = ActivationTrace.load_npz(io.BytesIO(router.recorder.to_bytes()))
    np.testing.assert_array_equal(recorded.topk_ids, served.topk_ids)

    predicted = evaluate(mesh.placement, recorded)
    assert status.fan_out_sum == pytest.approx(predicted.rows_LR.sum(), rel=TOLERANCE)
    nbytes = sum(
        STEPS * exchange_bytes(round(rows / STEPS), round(pairs / STEPS), router.shape.row_bytes)
        for rows, pairs in zip(predicted.rows_LR.ravel(), predicted.load_LR.ravel(), strict=True)
    )
    assert status.bytes_sent + status.bytes_received == pytest.approx(nbytes, rel=TOLERANCE)
    # Of tokens that are not in the trace at hand, the same to within what the halves' routing differs by.
    beforehand = evaluate(mesh.placement, halves[0])
    assert status.fan_out_sum / status.rows == pytest.approx(beforehand.fan_out.mean(), rel=2 * TOLERANCE)
