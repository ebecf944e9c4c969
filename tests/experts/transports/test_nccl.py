"""One router and several shards as processes, rows over NCCL: parity, failover, deadlines.

Without a GPU, the same tests run with gloo in NCCL's place.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from experts.dispatch.mesh_client import MeshClient
from tests.support.gpu_mesh import KINDS, mesh_over, on_device_of, router_over, run_there
from tests.support.small_mesh import (
    Mesh,
    assert_matches,
    one_process,
    oracle,
    random_batch,
    replicated,
    write_checkpoint,
)
from tests.support.waiting import await_true

NUM_LAYERS, NUM_EXPERTS, NUM_RANKS = 2, 6, 3
DISPATCH_TIMEOUT_MS = 5000  # long enough for a first step that loads code on a shared GPU


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[2, 1], ids=["replicas", "fallback"])
def mesh(model: Path, kind: str, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with mesh_over(kind, model, replicated(NUM_LAYERS, NUM_EXPERTS, NUM_RANKS, request.param)) as mesh:
        yield mesh


@pytest.fixture
def router(mesh: Mesh, kind: str) -> MeshClient:
    return router_over(kind, mesh, dispatch_timeout_ms=DISPATCH_TIMEOUT_MS)


def check_step(mesh: Mesh, router: MeshClient, seed: int, num_tokens: int = 20) -> None:
    """A whole step gives the oracle's result."""
    for layer in range(NUM_LAYERS):
        batch = random_batch(num_tokens, seed=seed + layer)
        assert_matches(run_there(router, layer, batch), oracle(mesh.checkpoint, layer, batch))


def check_went_on_without(mesh: Mesh, router: MeshClient, rank: int, reason: str) -> None:
    status = router.status()
    assert set(status.lost) == {rank}
    assert reason in status.lost[rank]
    assert status.failovers == 1
    has_replicas = bool((mesh.placement.logical_replica_count > 1).all())
    assert (status.fallback_pairs == 0) == has_replicas


@pytest.mark.parametrize("num_shards", [2, 3, 4])
def test_parity(model: Path, kind: str, num_shards: int) -> None:
    """Zero tokens, one, and more than fit into one message."""
    with mesh_over(kind, model, replicated(NUM_LAYERS, NUM_EXPERTS, num_shards, 1)) as mesh:
        router = router_over(kind, mesh, max_rows_per_dispatch=64)
        assert set(router.status().transports.values()) == {kind}
        for num_tokens in (0, 1, 7, 64, 300, 1, 0):
            for layer in range(NUM_LAYERS):
                batch = random_batch(num_tokens, seed=num_tokens + layer)
                got_TD = run_there(router, layer, batch)
                here_TD = one_process(model).forward(layer, batch.x_TD, batch.weights_TK, batch.ids_TK)
                assert_matches(got_TD, oracle(mesh.checkpoint, layer, batch))
                assert_matches(got_TD, here_TD)
        assert (router.status().failovers, router.status().fallback_pairs) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(model: Path, kind: str, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    with mesh_over(kind, model, replicated(NUM_LAYERS, NUM_EXPERTS, 2, 1), dtype=name) as mesh:
        router = router_over(kind, mesh, dtype)
        batch = random_batch(30, dtype=dtype)
        got_TD, expected_TD = run_there(router, 0, batch), oracle(mesh.checkpoint, 0, batch)
        # Weights, inner activations and partial sums have 8 (11) bits each.
        scale = expected_TD.abs().max().item()
        torch.testing.assert_close(got_TD.double(), expected_TD, rtol=0.05, atol=0.05 * scale)


@pytest.mark.gpu
def test_auto_kernel(model: Path) -> None:
    """The kernel that is fastest here."""
    with mesh_over("nccl", model, replicated(NUM_LAYERS, NUM_EXPERTS, 2, 1), kernel="auto") as mesh:
        check_step(mesh, router_over("nccl", mesh), 0)


def test_killed_while_idle(mesh: Mesh, router: MeshClient) -> None:
    check_step(mesh, router, 0)
    mesh.shards[1].signal(signal.SIGKILL)
    check_step(mesh, router, 10)
    check_went_on_without(mesh, router, 1, "")
    check_step(mesh, router, 20)
    assert router.status().failovers == 1


def test_killed_between_begin_and_finish(mesh: Mesh, router: MeshClient) -> None:
    """Its communicator has a send in flight that nothing will ever receive."""
    check_step(mesh, router, 0)
    batch = random_batch(40, seed=3)
    mesh.shards[1].signal(signal.SIGSTOP)  # so that it cannot have answered before it dies
    pending = router.begin(0, *on_device_of(router, batch))
    mesh.shards[1].signal(signal.SIGKILL)
    assert_matches(router.finish(pending).cpu(), oracle(mesh.checkpoint, 0, batch))
    check_went_on_without(mesh, router, 1, "")
    check_step(mesh, router, 10)


def test_stopped_then_continued(mesh: Mesh, router: MeshClient) -> None:
    """The deadline holds while the GPU waits for rows, and the GPU still works afterwards."""
    check_step(mesh, router, 0)
    mesh.shards[1].signal(signal.SIGSTOP)
    check_step(mesh, router, 10)
    check_went_on_without(mesh, router, 1, "deadline")
    mesh.shards[1].signal(signal.SIGCONT)
    for seed in range(20, 25):
        check_step(mesh, router, seed)
    await_true(lambda: mesh.shards[1].status().routers == [], "the shard's letting go of the router")
    # The next epoch brings it back, alive as it is.
    assert router.apply_membership(mesh.membership(epoch=2)).lost == {}
    check_step(mesh, router, 40)
    assert router.status().lost == {}


def test_all_die_at_once(mesh: Mesh, router: MeshClient) -> None:
    check_step(mesh, router, 0)
    for shard in mesh.shards.values():
        shard.signal(signal.SIGKILL)
    check_step(mesh, router, 10)
    assert set(router.status().lost) == set(range(NUM_RANKS))
    assert router.status().fallback_pairs > 0


def test_two_routers_take_nothing_from_each_other(mesh: Mesh, router: MeshClient, kind: str) -> None:
    other = router_over(kind, mesh, router_id="other")
    other.begin(0, *on_device_of(other, random_batch(10)))
    other.close()
    check_step(mesh, router, 0)
    await_true(lambda: "other" not in mesh.shards[0].status().routers, "the other router's leaving")
    check_step(mesh, router, 10)
    assert router.status().lost == {}
