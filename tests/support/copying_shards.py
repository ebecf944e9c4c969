"""Shards between which experts are copied: the target in this process, so that a test can act between two pieces."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from experts.checkpoint import ExpertCheckpoint
from experts.protocol.membership import Membership, ShardEndpoint
from experts.protocol.orders import CopyOrder, CopyResult
from experts.protocol.settings import ShardSettings
from experts.shard.server import ShardServer
from placement.placement import Placement
from tests.support.small_mesh import (
    assert_matches,
    make_router,
    oracle,
    random_batch,
    run,
    write_checkpoint,
)

NUM_LAYERS, NUM_EXPERTS, HIDDEN, WIDTH = 2, 6, 96, 1024
EXPERT_BYTES = 3 * HIDDEN * WIDTH * 4  # 1.2 MB: more than the ring holds
PAIRS = [(layer, expert) for layer in range(NUM_LAYERS) for expert in range(NUM_EXPERTS)]
WAYS = ["process", "shm", "tcp"]
SLOW = 3e6  # bytes a second: an expert takes 0.4 s, in nine pieces


def placement(*ranks: list[int]) -> Placement:
    """Ranks with the same experts in both layers, padded to the longest."""
    width = max(map(len, ranks))
    row = [expert for rank in ranks for expert in rank + [-1] * (width - len(rank))]
    return Placement(len(ranks), 1, NUM_EXPERTS, np.array([row] * NUM_LAYERS, np.int32), partial=True)


ALL = placement(list(range(NUM_EXPERTS)), list(range(NUM_EXPERTS)), [])


def copies_model(folder: Path) -> Path:
    """A checkpoint for them."""
    return write_checkpoint(
        folder, num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, hidden_size=HIDDEN, intermediate_size=WIDTH
    )


@contextlib.contextmanager
def server(model: Path, rank: int, kernel: str = "torch_loop") -> Iterator[ShardServer]:
    started = ShardServer(ShardSettings(model_path=str(model), dtype="float32", kernel=kernel))
    started.start(ALL, rank, 1)
    try:
        yield started
    finally:
        started.stop()


def elsewhere(shard: ShardEndpoint) -> ShardEndpoint:
    """As if it were on another host."""
    return dataclasses.replace(shard, host_id="elsewhere")


def ways_to(monkeypatch: pytest.MonkeyPatch, way: str) -> Callable[[ShardEndpoint], ShardEndpoint]:
    """How shards of this process reach others: "process"; "shm", their memory being closed to it; or "tcp"."""
    if way == "shm":
        monkeypatch.setattr("experts.transports.weights.memory.PeerMemory.proven", lambda self: False)
    return elsewhere if way == "tcp" else lambda endpoint: endpoint


def orders(*sources: ShardEndpoint, pairs: list[tuple[int, int]] = PAIRS) -> list[CopyOrder]:
    return [CopyOrder(layer, expert, sources) for layer, expert in pairs]


def copy(target: ShardServer, wanted: list[CopyOrder], **options: float) -> list[CopyResult]:
    results: list[CopyResult] = []
    target.copy(wanted, results.append, **options)  # type: ignore[arg-type]
    assert sorted((r.layer, r.expert) for r in results) == sorted((o.layer, o.expert) for o in wanted)
    return results


def check_right(target: ShardServer, model: Path) -> None:
    """The target answers every expert right, alone."""
    assert target.endpoint is not None
    assert (np.sort(target.held_Ls(), 1) == np.arange(NUM_EXPERTS)).all()
    router = make_router(model)
    try:
        whole = placement(list(range(NUM_EXPERTS)), [], [])
        endpoint = dataclasses.replace(target.endpoint, rank=0)
        router.apply_membership(Membership(5, whole, (endpoint, None, None)))
        for layer in range(NUM_LAYERS):
            batch = random_batch(20, num_experts=NUM_EXPERTS, hidden_size=HIDDEN, seed=layer)
            assert_matches(run(router, layer, batch), oracle(ExpertCheckpoint.open(model), layer, batch))
        status = router.status()
        assert (status.lost.get(0), status.fallback_pairs) == (None, 0), "the shard computed it"
    finally:
        router.close()
