"""The workers of a router dispatch every row once between them.

Legend: T tokens, K top-k, D hidden size.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from experts.dispatch.layer_shape import LayerShape
from experts.dispatch.mesh_client import MeshClient
from experts.dispatch.workers.row_share import RowShare
from experts.protocol.settings import RouterSettings, ShardSettings
from tests.support.small_mesh import (
    Mesh,
    assert_matches,
    mesh_of,
    oracle,
    random_batch,
    replicated,
    run,
    write_checkpoint,
)


@pytest.mark.parametrize("num_workers", [2, 3, 8])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 7, 64])
def test_each_row_is_one_workers(num_workers: int, num_tokens: int) -> None:
    ids_TK = np.random.default_rng(num_tokens).integers(0, 16, (num_tokens, 4), np.int32)
    before_TK = ids_TK.copy()
    shares = [RowShare(worker, num_workers).of(ids_TK) for worker in range(num_workers)]
    assert all(share.dtype == np.int32 and share.flags.c_contiguous for share in shares)
    assert np.array_equal(ids_TK, before_TK), "vLLM's own decisions were changed"
    has_row = np.array([(share >= 0).any(1) for share in shares])
    assert np.array_equal(has_row.sum(0), np.ones(num_tokens))
    assert np.array_equal(np.maximum.reduce(shares), ids_TK)
    rows = has_row.sum(1)
    assert rows.max(initial=0) - rows.min(initial=num_tokens) <= 1
    for start in range(num_tokens):  # what a message must have room for, wherever a batch begins
        assert (has_row[:, start : start + 2 * num_workers].sum(1) <= 2).all()


def test_a_worker_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="worker 2 of 2, expected 0 to 1"):
        RowShare(2, 2)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    model = write_checkpoint(tmp_path_factory.mktemp("share") / "model")
    with mesh_of(model, replicated(2, 6, 2, 2)) as mesh:
        yield mesh


def workers_of(mesh: Mesh, num_workers: int, **settings: object) -> list[MeshClient]:
    spec = mesh.checkpoint.spec
    shape = LayerShape(spec.num_layers, spec.num_experts, spec.top_k, spec.hidden_size, torch.float32)
    values = {"dispatch_timeout_ms": 30_000, "fallback_max_ms_per_step": 60_000, "router_id": "r", **settings}
    config = RouterSettings(model_path=str(mesh.model), transport="shm", **values)
    workers = [
        MeshClient(config, mesh.checkpoint, shape, "cpu", share=RowShare(worker, num_workers))
        for worker in range(num_workers)
    ]
    mesh.routers += workers
    for worker in workers:
        assert worker.apply_membership(mesh.membership()).lost == {}
    return workers


@pytest.mark.parametrize("max_rows", [2048, 3])
def test_the_workers_sums_add_up_to_the_layers(mesh: Mesh, max_rows: int) -> None:
    workers = workers_of(mesh, 2, max_rows_per_dispatch=max_rows)
    for num_tokens in (1, 2, 17):
        batch = random_batch(num_tokens, seed=num_tokens)
        for layer in range(2):
            sums = [run(worker, layer, batch).clone() for worker in workers]
            for worker, sum_TD in enumerate(sums):
                others = torch.arange(num_tokens) % 2 != worker
                assert not sum_TD[others].any(), "vLLM would add this to another worker's sums"
            assert_matches(sums[0] + sums[1], oracle(mesh.checkpoint, layer, batch))
    assert [worker.status().fallback_pairs for worker in workers] == [0, 0]


def test_one_worker_records_all_rows(mesh: Mesh) -> None:
    workers = workers_of(mesh, 2, trace_tokens=100)
    batch = random_batch(9, seed=3)
    for layer in range(2):
        for worker in workers:
            run(worker, layer, batch)
    assert [worker.records for worker in workers] == [True, False]
    assert len(workers[0].recorder.to_bytes()) > 0
    assert workers[0].status().rows == 18
    with pytest.raises(RuntimeError, match="records no trace"):
        workers[1].recorder.to_bytes()


def test_shards_name_a_router_once_and_count_the_pairs_of_each_worker_by_themselves(mesh: Mesh) -> None:
    limit = ShardSettings.model_fields["max_pairs_per_router"].default
    workers_of(mesh, limit + 1, router_id="many")
    for shard in mesh.shards.values():
        assert [name for name in shard.status().routers if name.startswith("many")] == ["many"]


def test_a_lost_shard_costs_no_worker_its_rows(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    with mesh_of(model, replicated(2, 6, 2, 1)) as mesh:
        workers = workers_of(mesh, 2)
        mesh.shards[0].end()
        batch = random_batch(11, seed=5)
        sums = [run(worker, 0, batch).clone() for worker in workers]
        assert_matches(sums[0] + sums[1], oracle(mesh.checkpoint, 0, batch))
        assert all(worker.status().failovers == 1 for worker in workers)
        assert all(worker.status().fallback_pairs > 0 for worker in workers)
