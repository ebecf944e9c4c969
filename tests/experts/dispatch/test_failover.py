"""Real shards, really killed and stopped: results stay those of the definition, and status says what happened."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from experts.dispatch.mesh_client import MeshClient
from experts.dispatch.pending import Pending
from experts.protocol.errors import ShardLostError
from experts.protocol.membership import AppliedMembership
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
from tests.support.waiting import await_true

NUM_LAYERS, NUM_EXPERTS, NUM_RANKS = 2, 6, 3
# How long a stopped shard is waited for. A loaded machine keeps a sound one from answering for half a second, too.
SILENCE_MS = 2000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=[2, 1], ids=["replicas", "fallback"])
def mesh(model: Path, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    """Three shards; with one replica each, a lost shard's experts are the router's to compute."""
    with mesh_of(model, replicated(NUM_LAYERS, NUM_EXPERTS, NUM_RANKS, request.param)) as mesh:
        yield mesh


def has_replicas(mesh: Mesh) -> bool:
    return bool((mesh.placement.logical_replica_count > 1).all())


def check_step(mesh: Mesh, router: MeshClient, seed: int, num_tokens: int = 20) -> None:
    """A whole step gives what the definition gives."""
    for layer in range(NUM_LAYERS):
        batch = random_batch(num_tokens, seed=seed + layer)
        assert_matches(run(router, layer, batch), oracle(mesh.checkpoint, layer, batch))


def check_went_on_without(mesh: Mesh, router: MeshClient, rank: int, reason: str) -> None:
    """The shard is out, once, with its reason; without replicas, its experts were computed here."""
    status = router.status()
    assert set(status.lost) == {rank}
    assert reason in status.lost[rank]
    assert status.connected == [r for r in range(NUM_RANKS) if r != rank]
    assert status.failovers == 1
    assert (status.fallback_pairs == 0) == has_replicas(mesh)
    assert status.last_success_age_s is not None


@pytest.mark.parametrize("rank", [0, 2])
def test_killed_between_begin_and_finish(mesh: Mesh, rank: int) -> None:
    router = mesh.router()
    check_step(mesh, router, 0)
    batch = random_batch(40, seed=3)
    mesh.shards[rank].signal(signal.SIGSTOP)  # so that it cannot have answered before it dies
    pending = router.begin(0, batch.x_TD, batch.weights_TK, batch.ids_TK)
    mesh.shards[rank].signal(signal.SIGKILL)
    assert_matches(router.finish(pending), oracle(mesh.checkpoint, 0, batch))
    check_went_on_without(mesh, router, rank, "closed the connection")
    check_step(mesh, router, 10)
    assert router.status().failovers == 1


def test_killed_while_idle(mesh: Mesh) -> None:
    router = mesh.router()
    check_step(mesh, router, 0)
    mesh.shards[1].signal(signal.SIGKILL)
    check_step(mesh, router, 10)
    check_went_on_without(mesh, router, 1, "closed the connection")


def test_gone_when_posted_to(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    router = mesh.router()
    link = router.dispatcher.links[1]

    def post(nbytes: int) -> None:
        mesh.shards[1].signal(signal.SIGKILL)
        raise ShardLostError(1, "its process closed the connection")

    monkeypatch.setattr(link, "post", post)
    monkeypatch.setattr(router.dispatcher.mover, "send", lambda *_: None)  # C++ would post by itself
    check_step(mesh, router, 0)
    check_went_on_without(mesh, router, 1, "closed the connection")


def test_stopped_then_continued(mesh: Mesh) -> None:
    router = mesh.router(dispatch_timeout_ms=SILENCE_MS)
    check_step(mesh, router, 0)
    mesh.shards[1].signal(signal.SIGSTOP)
    check_step(mesh, router, 10)
    check_went_on_without(mesh, router, 1, "before the dispatch deadline")
    # Its late answer goes nowhere, and neither does anything after it.
    answered = 2 * NUM_LAYERS
    mesh.shards[1].signal(signal.SIGCONT)
    for seed in range(20, 30):
        check_step(mesh, router, seed)
    await_true(lambda: mesh.shards[1].status().routers == [], "the shard's letting go of the router")
    assert mesh.shards[1].status().requests <= answered
    # The next epoch brings it back, alive as it is.
    applied = router.apply_membership(mesh.membership(epoch=2))
    assert applied == AppliedMembership(2, [0, 1, 2], {}, [])
    fallback = router.status().fallback_pairs
    check_step(mesh, router, 40)
    status = router.status()
    assert (status.lost, status.failovers, status.fallback_pairs) == ({}, 1, fallback)


@pytest.mark.parametrize("dead", [(0, 1), (0, 1, 2)], ids=["two", "all"])
def test_several_die_at_once(mesh: Mesh, dead: tuple[int, ...]) -> None:
    router, batch = mesh.router(), random_batch(40, seed=3)
    for rank in dead:
        mesh.shards[rank].signal(signal.SIGSTOP)
    pending = router.begin(1, batch.x_TD, batch.weights_TK, batch.ids_TK)
    for rank in dead:
        mesh.shards[rank].signal(signal.SIGKILL)
    assert_matches(router.finish(pending), oracle(mesh.checkpoint, 1, batch))
    check_step(mesh, router, 10)
    status = router.status()
    assert set(status.lost) == set(dead)
    assert status.fallback_pairs > 0
    if len(dead) == NUM_RANKS:
        assert status.connected == []
        computed = status.fallback_pairs
        check_step(mesh, router, 20)
        assert router.status().fallback_pairs == computed + NUM_LAYERS * 20 * 3


def test_another_dies_during_the_repetition(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three replicas: 0 falls silent, the rows go out again, and 1 is killed before it can answer them."""
    with mesh_of(model, replicated(NUM_LAYERS, NUM_EXPERTS, NUM_RANKS, 3)) as mesh:
        router, batch = mesh.router(dispatch_timeout_ms=SILENCE_MS), random_batch(40, seed=3)
        lose = router.dispatcher._lose

        def stop_the_next(error: Exception) -> None:
            lose(error)
            if error.rank == 0:
                mesh.shards[1].signal(signal.SIGKILL)

        monkeypatch.setattr(router.dispatcher, "_lose", stop_the_next)
        mesh.shards[0].signal(signal.SIGSTOP)
        assert_matches(run(router, 0, batch), oracle(mesh.checkpoint, 0, batch))
        status = router.status()
        assert set(status.lost) == {0, 1}
        assert (status.connected, status.fallback_pairs) == ([2], 0)
        check_step(mesh, router, 10)


def test_in_the_middle_of_a_large_step(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty tokens in messages of at most seven rows: a shard dies after the second."""
    router, batch = mesh.router(max_rows_per_dispatch=7), random_batch(40, seed=3)
    dispatcher, starts = router.dispatcher, []
    begin_batch = dispatcher._begin_batch

    def kill_and_begin(pending: Pending) -> None:
        starts.append(pending.stop)
        if len(starts) == 3:
            mesh.shards[1].signal(signal.SIGKILL)
        begin_batch(pending)

    monkeypatch.setattr(dispatcher, "_begin_batch", kill_and_begin)
    assert_matches(run(router, 0, batch), oracle(mesh.checkpoint, 0, batch))
    assert starts == [0, 7, 14, 21, 28, 35]
    check_went_on_without(mesh, router, 1, "closed the connection")


def test_a_router_that_dies_leaves_the_others_alone(mesh: Mesh) -> None:
    first, second = mesh.router(router_id="first"), mesh.router(router_id="second")
    batch = random_batch(10)
    first.begin(0, batch.x_TD, batch.weights_TK, batch.ids_TK)
    first.close()
    check_step(mesh, second, 0)
    await_true(lambda: mesh.shards[0].status().routers == ["second"], "the first router's leaving")


def test_restarted_shard_comes_back_with_the_next_epoch(mesh: Mesh) -> None:
    router = mesh.router()
    mesh.shards[1].signal(signal.SIGKILL)
    check_step(mesh, router, 0)
    fallback = router.status().fallback_pairs
    kept = {rank: router.dispatcher.links[rank] for rank in (0, 2)}
    old = mesh.shards[1].endpoint
    mesh.restart(1)
    assert mesh.shards[1].endpoint.incarnation != old.incarnation
    applied = router.apply_membership(mesh.membership(epoch=2))
    assert applied == AppliedMembership(2, [0, 1, 2], {}, [])
    assert {rank: router.dispatcher.links[rank] for rank in kept} == kept
    check_step(mesh, router, 10)
    status = router.status()
    assert (status.epoch, status.lost, status.failovers) == (2, {}, 1)
    assert status.fallback_pairs == fallback
    assert mesh.shards[1].status().requests == NUM_LAYERS
    assert mesh.shards[1].status().last_epoch == 2


def test_half_precision_survives_too(model: Path) -> None:
    with mesh_of(model, replicated(NUM_LAYERS, NUM_EXPERTS, NUM_RANKS, 1), dtype="bfloat16") as mesh:
        router = mesh.router(dtype=torch.bfloat16)
        batch = random_batch(30, dtype=torch.bfloat16)
        mesh.shards[1].signal(signal.SIGKILL)
        got_TD, expected_TD = run(router, 0, batch), oracle(mesh.checkpoint, 0, batch)
        # Weights, inner activations and parts have 8 bits each.
        torch.testing.assert_close(got_TD.double(), expected_TD, rtol=0.05, atol=0.05 * expected_TD.abs().max().item())
        assert router.status().fallback_pairs > 0
