"""Epochs prepared beside the steps: which links they keep, what they wait for, and what becomes of one overtaken."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from experts.dispatch.mesh_client import MeshClient
from experts.protocol.membership import AppliedMembership
from placement.placement import Placement
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

NUM_LAYERS, NUM_EXPERTS = 2, 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def mesh(model: Path) -> Iterator[Mesh]:
    with mesh_of(model, Placement.linear(NUM_LAYERS, NUM_EXPERTS, 2)) as mesh:
        yield mesh


def check(mesh: Mesh, router: MeshClient, seed: int = 0) -> None:
    batch = random_batch(11, seed=seed)
    assert_matches(run(router, 0, batch), oracle(mesh.checkpoint, 0, batch))


def ready(router: MeshClient) -> bool:
    state = router.preparation()
    assert not state.error, state
    return state.ready


def test_a_slow_shard_is_connected_to_in_the_background(model: Path) -> None:
    """While one shard is silent, an epoch takes what is there; the next takes the connection that was made since."""
    with mesh_of(model, Placement.linear(NUM_LAYERS, NUM_EXPERTS, 3)) as mesh:
        router = mesh.router(apply=False)
        first, later = mesh.membership(epoch=1, without=(2,)), mesh.membership(epoch=2)
        mesh.shards[1].signal(signal.SIGSTOP)
        router.prepare(first, 1.0)
        await_true(lambda: router.preparation().connecting == [1], "shard 0's connection")
        await_true(lambda: ready(router), "the epoch without shard 1")
        applied = router.apply(1)
        assert (applied.connected, applied.lost[1]) == ([0], "still connecting")
        check(mesh, router)
        mesh.shards[1].signal(signal.SIGCONT)
        router.prepare(later.delta_from(first))
        await_true(lambda: ready(router), "the connections")
        assert router.apply(2) == AppliedMembership(2, [0, 1, 2], {}, [])
        check(mesh, router, seed=1)
        assert [shard.status().routers for shard in mesh.shards.values()] == [[router.router_id]] * 3


def test_an_epoch_that_is_overtaken_hands_its_links_on(model: Path) -> None:
    """Epochs follow one another faster than they are used: no shard is connected to twice, none is kept for nothing."""
    with mesh_of(model, Placement.linear(NUM_LAYERS, NUM_EXPERTS, 3)) as mesh:
        router = mesh.router(apply=False)
        router.prepare(mesh.membership(epoch=1))
        await_true(lambda: ready(router), "epoch 1")
        router.prepare(mesh.membership(epoch=2, without=(2,)))
        with pytest.raises(ValueError, match=r"epoch 1 is not ready to be applied; the newest: .*epoch=2"):
            router.apply(1)
        await_true(lambda: ready(router), "epoch 2")
        assert not router.attached
        assert router.apply(2).connected == [0, 1]
        await_true(lambda: mesh.shards[2].status().routers == [], "shard 2's letting go of the router")
        assert [mesh.shards[rank].status().routers for rank in (0, 1)] == [[router.router_id]] * 2
        check(mesh, router)
        with pytest.raises(ValueError, match="epoch 2 is not ready"):
            router.apply(2)


def test_a_wait_for_a_slow_shard_ends_when_another_epoch_is_told(model: Path) -> None:
    with mesh_of(model, Placement.linear(NUM_LAYERS, NUM_EXPERTS, 2)) as mesh:
        router = mesh.router(apply=False)
        mesh.shards[1].signal(signal.SIGSTOP)
        router.prepare(mesh.membership(epoch=1))
        await_true(lambda: router.preparation().connecting == [1], "shard 0's connection")
        router.prepare(mesh.membership(epoch=2, without=(1,)))
        await_true(lambda: ready(router), "epoch 2, which does without shard 1", timeout_s=20)
        assert router.apply(2).connected == [0]
        mesh.shards[1].signal(signal.SIGCONT)
        await_true(lambda: mesh.shards[1].status().routers == [], "shard 1's letting go of the router")
        check(mesh, router)


def test_a_link_that_is_lost_while_its_epoch_is_prepared_stays_lost(model: Path) -> None:
    with mesh_of(model, replicated(NUM_LAYERS, NUM_EXPERTS, 3, 2)) as mesh:
        router = mesh.router()
        router.prepare(mesh.membership(epoch=2))
        await_true(lambda: ready(router), "epoch 2")
        mesh.shards[1].signal(signal.SIGKILL)
        check(mesh, router)
        applied = router.apply(2)
        assert (applied.connected, set(applied.lost)) == ([0, 2], {1})
        assert "closed the connection" in applied.lost[1]
        check(mesh, router, seed=1)
        status = router.status()
        assert (status.failovers, status.fallback_pairs, status.uncovered_pairs) == (1, 0, 0)


def test_a_difference_from_an_epoch_that_is_not_in_use_is_asked_for_as_a_whole(mesh: Mesh) -> None:
    router = mesh.router()
    router.prepare(mesh.membership(epoch=9).delta_from(mesh.membership(epoch=8, without=(1,))))
    await_true(lambda: router.preparation().error, "the refusal")
    assert router.preparation().needs_whole
    with pytest.raises(ValueError, match="epoch 9 is told as a difference from epoch 8, here is 1"):
        router.apply(9)
    router.prepare(mesh.membership(epoch=9).to_bytes())
    await_true(lambda: ready(router), "the whole epoch")
    assert router.apply(9).lost == {}
    check(mesh, router)
