"""A router's membership: which epochs it takes, which links it keeps, what it says of shards that it cannot reach."""

from __future__ import annotations

import errno
import io
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.serve_environment import free_ports
from experts.checkpoint import ExpertCheckpoint
from experts.dispatch import mesh_client
from experts.dispatch.layer_shape import LayerShape
from experts.dispatch.mesh_client import MeshClient
from experts.protocol.errors import UnsupportedModelError
from experts.protocol.membership import AppliedMembership, Membership, ShardEndpoint
from experts.protocol.settings import RouterSettings
from experts.transports.base import RouterLink
from experts.transports.shm import ShmRouterLink
from placement.placement import Placement
from placement.traces.trace import ActivationTrace
from tests.support.small_mesh import (
    Mesh,
    assert_matches,
    make_router,
    mesh_of,
    oracle,
    random_batch,
    replicated,
    run,
    write_checkpoint,
)
from tests.support.waiting import await_true

NUM_LAYERS, NUM_EXPERTS, TOP_K, HIDDEN = 2, 6, 3, 24


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


def test_before_the_first_epoch(mesh: Mesh) -> None:
    router = mesh.router(apply=False)
    assert not router.attached
    status = router.status()
    assert (status.epoch, status.connected, status.lost) == (-1, [], {})
    assert status.last_success_age_s is None
    router.attach_static()
    assert not router.attached, "no membership came with the settings"


def test_a_membership_can_come_with_the_settings(mesh: Mesh) -> None:
    router = mesh.router(apply=False, membership=mesh.membership().to_dict())
    assert not router.attached
    router.attach_static()
    assert router.attached
    check(mesh, router)
    router.apply_membership(mesh.membership(epoch=4))
    router.attach_static()
    assert router.status().epoch == 4


def test_an_older_epoch_is_refused_and_the_same_one_taken_again(mesh: Mesh) -> None:
    router = mesh.router(apply=False)
    router.apply_membership(mesh.membership(epoch=5))
    links = dict(router.dispatcher.links)
    with pytest.raises(ValueError, match="epoch 4 is older than the current epoch 5"):
        router.apply_membership(mesh.membership(epoch=4))
    assert router.status().epoch == 5
    assert router.apply_membership(mesh.membership(epoch=5)).connected == [0, 1]
    assert router.dispatcher.links == links
    check(mesh, router)


def test_a_placement_of_another_model_is_refused_before_anyone_is_called(mesh: Mesh) -> None:
    router = mesh.router()
    links = dict(router.dispatcher.links)
    nowhere = ShardEndpoint(0, "x", "127.0.0.1", 1, "x", 1)
    other = Membership(2, Placement.linear(NUM_LAYERS, 8, 1), (nowhere,))
    with pytest.raises(ValueError, match="the placement is for 2 layers of 8 experts, the model for 2 of 6"):
        router.apply_membership(other)
    assert (router.status().epoch, router.dispatcher.links) == (1, links)
    check(mesh, router)


def test_shards_whose_pairs_cannot_fit_are_refused_before_anyone_is_called(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experts.transports.memory_limit.memory_limit", lambda: 1 << 20)
    router = mesh.router(apply=False)
    with pytest.raises(ValueError, match=r"2 pairs of 0\.\d MB might not fit: 0\.00 GB are left of the 0\.00 GB"):
        router.apply_membership(mesh.membership())
    assert not router.attached
    monkeypatch.undo()
    router.apply_membership(mesh.membership())
    check(mesh, router)


def test_a_router_that_idles_gives_memory_back_as_it_reports(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    router = mesh.router()
    trimmed: list[int] = []
    monkeypatch.setattr(ShmRouterLink, "trim", lambda link: trimmed.append(link.rank))
    router.status()
    assert trimmed == []
    monkeypatch.setattr(mesh_client, "TRIM_EVERY_S", 0.0)
    router.status()
    assert sorted(trimmed) == [0, 1]
    check(mesh, router)


def test_links_to_known_incarnations_are_kept(mesh: Mesh) -> None:
    router = mesh.router(router_id="keeper")
    links = dict(router.dispatcher.links)
    router.apply_membership(mesh.membership(epoch=2))
    assert router.dispatcher.links == links
    for shard in mesh.shards.values():
        assert shard.status().routers.count("keeper") == 1
    check(mesh, router)


def test_a_rank_without_a_shard_is_served_from_the_checkpoint(mesh: Mesh) -> None:
    router = mesh.router(router_id="half")
    dropped = router.dispatcher.links[1]
    applied = router.apply_membership(mesh.membership(epoch=2, without=(1,)))
    assert applied == AppliedMembership(2, [0], {1: "no shard has this rank yet"}, [])
    with pytest.raises(Exception, match="closed"):
        dropped.post(0)
    await_true(lambda: "half" not in mesh.shards[1].status().routers, "shard 1's letting go of the router")
    check(mesh, router)
    status = router.status()
    assert (status.failovers, status.fallback_pairs > 0) == (0, True)
    assert status.last_success_age_s is not None
    assert router.apply_membership(mesh.membership(epoch=3)).lost == {}
    check(mesh, router)
    assert router.status().fallback_pairs == status.fallback_pairs


def test_a_shard_restarted_while_the_router_was_idle_is_connected_anew(model: Path) -> None:
    """The router has not noticed: its old link stands as if nothing had happened."""
    with mesh_of(model, Placement.linear(NUM_LAYERS, NUM_EXPERTS, 2)) as mesh:
        router = mesh.router()
        kept, old = router.dispatcher.links[0], router.dispatcher.links[1]
        mesh.restart(1)
        assert router.apply_membership(mesh.membership(epoch=2)).connected == [0, 1]
        assert router.dispatcher.links[0] is kept
        assert router.dispatcher.links[1] is not old
        check(mesh, router)
        assert (router.status().failovers, router.status().lost) == (0, {})


def test_fewer_and_more_ranks(model: Path, mesh: Mesh) -> None:
    """Ranks come and go with placements; counts of the ranks that stay are kept."""
    with mesh_of(model, Placement.linear(NUM_LAYERS, NUM_EXPERTS, 3)) as wider:
        router = mesh.router()
        check(mesh, router)
        before = router.status().shard_pairs
        router.apply_membership(replace(wider.membership(), epoch=2))
        check(mesh, router, seed=1)
        after = router.status().shard_pairs
        assert len(after) == 3
        assert after[:2] >= before
        router.apply_membership(mesh.membership(epoch=3))
        check(mesh, router, seed=2)
        assert router.status().num_ranks == len(router.status().shard_pairs) == 2
        router.close()


def test_shards_that_cannot_be_reached_are_named_with_their_reasons(mesh: Mesh) -> None:
    """One listens no more, one never answers, one is another incarnation by now: all at once, within one deadline."""
    (closed_port,) = free_ports(1)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        base = mesh.shards[0].endpoint
        endpoints = (
            replace(base, rank=0, port=closed_port),
            replace(base, rank=1, port=mute.getsockname()[1]),
            replace(base, rank=2, incarnation="an-older-one"),
        )
        router = mesh.router(apply=False, connect_timeout_s=3.0)
        applied = router.apply_membership(Membership(1, Placement.linear(NUM_LAYERS, NUM_EXPERTS, 3), endpoints))
    assert applied.connected == []
    assert set(applied.lost) == {0, 1, 2}
    assert (applied.refused, applied.refusal) == ([], None)
    assert "the router wants an-older-one" in applied.lost[2]
    assert all(applied.lost.values())
    check(mesh, router)
    assert router.attached
    assert router.status().lost == applied.lost


def test_a_connection_that_fails_in_the_router_itself_costs_no_other_one(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of descriptors, say, long after the engine started: the epoch is taken with the links that there are."""
    router = mesh.router(apply=False)
    connector = router._epochs._connector
    open_link = connector._open_link

    def short_of_descriptors(endpoint: ShardEndpoint) -> RouterLink:
        if endpoint.rank == 1:
            raise OSError(errno.EMFILE, "Too many open files")
        return open_link(endpoint)

    monkeypatch.setattr(connector, "_open_link", short_of_descriptors)
    applied = router.apply_membership(mesh.membership())
    assert (applied.connected, applied.refused) == ([0], [])
    assert "Too many open files" in applied.lost[1]
    check(mesh, router)


def test_a_stopped_shard_is_not_waited_for_longer_than_the_deadline(model: Path) -> None:
    with mesh_of(model, Placement.linear(NUM_LAYERS, NUM_EXPERTS, 2)) as mesh:
        mesh.shards[1].signal(signal.SIGSTOP)
        router = mesh.router(apply=False, connect_timeout_s=3.0)
        applied = router.apply_membership(mesh.membership())
        assert (applied.connected, set(applied.lost)) == ([0], {1})
        check(mesh, router)
        mesh.shards[1].signal(signal.SIGCONT)
        # The same epoch again is how a controller has a router try once more.
        await_true(lambda: router.apply_membership(mesh.membership()).lost == {}, "the connection")
        check(mesh, router)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_experts": 8}, r"the engine's experts is 8, the checkpoint .* says 6"),
        ({"hidden_size": 32}, r"the engine's hidden size is 32, the checkpoint .* says 24"),
        ({"dtype": torch.float64}, r"dtype torch.float64 is not served, expected one of"),
    ],
)
def test_an_engine_that_does_not_fit_the_checkpoint_is_refused(model: Path, changes: dict, text: str) -> None:
    shape = replace(LayerShape(NUM_LAYERS, NUM_EXPERTS, TOP_K, HIDDEN, torch.float32), **changes)
    with pytest.raises(UnsupportedModelError, match=text):
        MeshClient(RouterSettings(model_path=str(model)), ExpertCheckpoint.open(model), shape, "cpu")


def test_memberships_survive_json(mesh: Mesh) -> None:
    membership = mesh.membership(epoch=9, without=(0,))
    again = Membership.from_dict(membership.to_dict())
    assert (again.epoch, again.endpoints) == (9, membership.endpoints)
    assert again.placement.to_json() == membership.placement.to_json()


@pytest.mark.parametrize(
    ("epoch", "ranks", "text"),
    [
        (-1, [0, 1], "epoch is -1, expected 0 or more"),
        (1, [0], "membership has 1 endpoints for a placement of 2 ranks"),
        (1, [1, 0], "endpoint of rank 1 stands at rank 0"),
    ],
)
def test_a_membership_is_checked(epoch: int, ranks: list[int], text: str) -> None:
    endpoints = tuple(ShardEndpoint(rank, "x", "127.0.0.1", 1, "x", 1) for rank in ranks)
    with pytest.raises(ValueError, match=text):
        Membership(epoch, Placement.linear(NUM_LAYERS, NUM_EXPERTS, 2), endpoints)


def test_an_unknown_setting_is_an_error_that_names_it(model: Path) -> None:
    with pytest.raises(ValueError, match="dispatch_deadline_s"):
        make_router(model, dispatch_deadline_s=1)


def test_replicas_on_the_own_host_come_first_if_wanted(model: Path) -> None:
    with mesh_of(model, replicated(NUM_LAYERS, NUM_EXPERTS, 3, 2)) as mesh:
        endpoints = tuple(
            endpoint if rank == 0 else replace(endpoint, host_id="elsewhere")
            for rank, endpoint in enumerate(mesh.membership().endpoints)
            if endpoint is not None
        )
        membership = replace(mesh.membership(), endpoints=endpoints)
        router = mesh.router(apply=False, prefer_local_replicas=True)
        router.apply_membership(membership)
        check(mesh, router)
        held = set(mesh.placement.experts_of_rank(0)[0].tolist()) - {-1}
        wanted = random_batch(11, seed=0).ids_TK.flatten().tolist()
        pairs_R = router.status().shard_pairs
        assert pairs_R[0] == sum(expert in held for expert in wanted), "all that is near is fetched there"
        assert sum(pairs_R) == len(wanted)
        mesh.shards[0].signal(signal.SIGKILL)
        check(mesh, router, seed=1)
        assert router.status().fallback_pairs == 0, "what was near is had elsewhere too"
        near_to_none = mesh.router(apply=False, prefer_local_replicas=True)
        near_to_none.apply_membership(replace(membership, endpoints=(None, *endpoints[1:])))
        check(mesh, near_to_none, seed=2)


def test_a_router_records_what_it_dispatched_and_nothing_else(mesh: Mesh) -> None:
    router = mesh.router(trace_tokens=50)
    batches = [random_batch(4, seed=layer) for layer in range(NUM_LAYERS)]
    for record in (True, False):
        for layer, batch in enumerate(batches):
            router.finish(router.begin(layer, batch.x_TD, batch.weights_TK, batch.ids_TK, record=record))
    trace = ActivationTrace.load_npz(io.BytesIO(router.recorder.to_bytes()))
    np.testing.assert_array_equal(trace.topk_ids, np.stack([b.ids_TK for b in batches], 1))
