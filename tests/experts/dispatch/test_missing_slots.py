"""A shard that has no slot for an expert: that expert is had elsewhere until the next epoch, the shard is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experts.checkpoint import ExpertCheckpoint
from experts.dispatch.dispatcher import MAX_MISSING_SLOTS
from experts.protocol.membership import AppliedMembership, Membership
from experts.protocol.wire import H_SEQ, header_of, no_slot_reply
from placement.placement import Placement
from tests.support.fake_links import FakeLink, FakeMesh, fake_mesh
from tests.support.small_mesh import (
    assert_matches,
    mesh_of,
    oracle,
    random_batch,
    replicated,
    run,
    write_checkpoint,
)

NUM_LAYERS, NUM_EXPERTS, NUM_RANKS = 2, 6, 3
EVERYWHERE = replicated(NUM_LAYERS, NUM_EXPERTS, NUM_RANKS, NUM_RANKS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


def without(placement: Placement, pairs: set[tuple[int, int, int]]) -> Placement:
    """A placement less some (layer, expert, rank)."""
    map_LS = placement.physical_to_logical_map.copy()
    for layer, expert, rank in pairs:
        slots = slice(rank * placement.slots_per_rank, (rank + 1) * placement.slots_per_rank)
        held = map_LS[layer, slots]
        held[held == expert] = -1
    return Placement(placement.num_ranks, 1, placement.num_experts, map_LS, partial=True)


def lacking(mesh: FakeMesh, pairs: set[tuple[int, int, int]]) -> None:
    """The links' shards lack `pairs`; the dispatcher believes they have them."""
    assert mesh.dispatcher.membership is not None
    held_LER = without(mesh.dispatcher.membership.placement, pairs).slots_LER
    for rank, link in mesh.links.items():
        link._slots_LE = held_LER[:, :, rank]


def check_layer(mesh: FakeMesh, model: Path, layer: int, num_tokens: int, seed: int) -> None:
    batch = random_batch(num_tokens, seed=seed)

    assert_matches(mesh.forward(batch, layer), oracle(ExpertCheckpoint.open(model), layer, batch))


def test_one_missing_slot_costs_one_pair(model: Path) -> None:
    mesh = fake_mesh(model, EVERYWHERE)
    lacking(mesh, {(0, 2, 1)})
    for seed in range(4):
        for layer in range(NUM_LAYERS):
            check_layer(mesh, model, layer, 20, seed)
    stats, dispatcher = mesh.dispatcher.stats, mesh.dispatcher
    assert (stats.no_slot_pairs, stats.failovers, stats.fallback_pairs) == (1, 1, 0)
    assert (sorted(dispatcher.links), dispatcher.lost) == ([0, 1, 2], {})
    assert not any(link.closed for link in mesh.links.values())
    assert dispatcher.uncovered_pairs == 0


def test_the_next_epoch_brings_the_pair_back(model: Path) -> None:
    mesh = fake_mesh(model, EVERYWHERE)
    lacking(mesh, {(0, expert, 1) for expert in range(3)})
    check_layer(mesh, model, 0, 20, 0)
    lost = mesh.dispatcher.stats.no_slot_pairs
    assert 1 <= lost <= 3, "those that it was asked for"
    lacking(mesh, set())
    mesh.dispatcher.apply(Membership(2, EVERYWHERE, (None,) * 3), dict(mesh.links), {})
    posted = len(mesh.links[1].posted)
    check_layer(mesh, model, 0, 20, 0)
    assert len(mesh.links[1].posted) == posted + 1
    assert mesh.dispatcher.stats.no_slot_pairs == lost


def test_what_nobody_has_is_computed_here(model: Path) -> None:
    mesh = fake_mesh(model, EVERYWHERE)
    lacking(mesh, {(1, 4, rank) for rank in range(NUM_RANKS)})
    check_layer(mesh, model, 1, 30, 0)
    assert mesh.dispatcher.stats.no_slot_pairs == NUM_RANKS
    assert mesh.dispatcher.stats.fallback_pairs > 0
    assert mesh.dispatcher.uncovered_pairs == 1
    assert sorted(mesh.dispatcher.links) == [0, 1, 2]


def test_a_shard_that_lacks_very_many_is_left_out_of_the_layer_only(tmp_path: Path) -> None:
    """Each missing slot costs an exchange, so their number in one layer is bounded."""
    many = 24
    model = write_checkpoint(tmp_path / "model", num_experts=many)
    split = replicated(NUM_LAYERS, many, 2, 1)
    with mesh_of(model, without(split, {(0, expert, 1) for expert in range(many)})) as mesh:
        mesh.placement = split
        router = mesh.router(apply=False)
        assert router.apply_membership(mesh.membership()).connected == [0, 1]
        batch = random_batch(40, num_experts=many)
        assert_matches(run(router, 0, batch), oracle(mesh.checkpoint, 0, batch))
        status = router.status()
        assert status.no_slot_pairs == status.uncovered_pairs == many // 2 > MAX_MISSING_SLOTS
        assert status.failovers == mesh.shards[1].status().errors == MAX_MISSING_SLOTS + 1
        assert (status.connected, status.lost) == ([0, 1], {})
        assert_matches(run(router, 1, batch), oracle(mesh.checkpoint, 1, batch))
        assert router.status().failovers == status.failovers, "it has all of the other layer"


@pytest.mark.parametrize("layer_and_expert", [(1, 2), (0, 99), (0, -3), (0, 2)])
def test_a_shard_that_lacks_what_it_was_not_asked_for_is_lost(model: Path, layer_and_expert: tuple[int, int]) -> None:
    """Another layer, no expert of the model, or an expert that it is known to lack: believing it would never end."""

    def lies(link: FakeLink, length: int) -> int:
        return no_slot_reply(link.recv_buffer, int(header_of(link.recv_buffer)[H_SEQ]), "none", *layer_and_expert)

    mesh = fake_mesh(model, without(EVERYWHERE, {(0, 2, 1)}))
    mesh.links[1].wait_faults = [lies]
    check_layer(mesh, model, 0, 30, 0)
    assert "lacks what it was not asked for" in mesh.dispatcher.lost[1]
    assert mesh.dispatcher.stats.no_slot_pairs == 0


PAIRS = st.sets(
    st.tuples(st.integers(0, NUM_LAYERS - 1), st.integers(0, NUM_EXPERTS - 1), st.integers(0, NUM_RANKS - 1))
)


@given(
    replicas=st.integers(1, NUM_RANKS),
    epochs=st.lists(st.tuples(PAIRS, st.lists(st.integers(0, 12), min_size=1, max_size=3)), min_size=1, max_size=3),
    max_rows=st.sampled_from([3, 64]),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_shards_lack_results_are_right(
    model: Path, replicas: int, epochs: list[tuple[set[tuple[int, int, int]], list[int]]], max_rows: int
) -> None:
    placement = replicated(NUM_LAYERS, NUM_EXPERTS, NUM_RANKS, replicas)
    mesh = fake_mesh(model, placement, max_rows=max_rows)
    for number, (pairs, steps) in enumerate(epochs):
        mesh.dispatcher.apply(Membership(number + 2, placement, (None,) * NUM_RANKS), dict(mesh.links), {})
        lacking(mesh, pairs)
        before = mesh.dispatcher.stats.no_slot_pairs
        for seed, num_tokens in enumerate(steps):
            for layer in range(NUM_LAYERS):
                check_layer(mesh, model, layer, num_tokens, seed)
        truly = {pair for pair in pairs if placement.slots_LER[pair] >= 0}
        assert mesh.dispatcher.stats.no_slot_pairs - before <= len(truly)
        assert len(mesh.dispatcher.links) == NUM_RANKS


def test_real_shards_that_lack_experts_stay_connected(model: Path) -> None:
    """What each shard holds is less than what the router was told, and different in each layer."""
    gone = {(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 4, 1), (1, 3, 2), (1, 5, 0)}
    with mesh_of(model, without(EVERYWHERE, gone)) as mesh:
        mesh.placement = EVERYWHERE
        router = mesh.router()
        for seed in range(5):
            for layer in range(NUM_LAYERS):
                batch = random_batch(30, seed=seed)
                assert_matches(run(router, layer, batch), oracle(mesh.checkpoint, layer, batch))
        status = router.status()
        assert (status.connected, status.lost) == ([0, 1, 2], {})
        assert 3 <= status.no_slot_pairs <= len(gone)
        assert (status.fallback_pairs > 0, status.uncovered_pairs) == (True, 1)
        applied = router.apply_membership(Membership(2, without(EVERYWHERE, gone), mesh.membership().endpoints))
        assert applied == AppliedMembership(2, [0, 1, 2], {}, [])
        assert router.status().uncovered_pairs == 1
        check = random_batch(30, seed=9)
        assert_matches(run(router, 0, check), oracle(mesh.checkpoint, 0, check))
        assert router.status().no_slot_pairs == status.no_slot_pairs, "this epoch tells what they have"
