"""Migration plans: legal at every prefix, ending at the target, bounded, and refusing what cannot be done."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from placement.migration.plan import MigrationError, MigrationPlan, plan_migration
from placement.placement import Placement
from placement.topology import Topology


def random_placement(rng, num_layers, num_experts, num_ranks, slots_per_rank, num_nodes=1, share_filled=1.0):
    """Every expert somewhere, the other slots filled at random as far as `share_filled` says."""
    num_slots = num_ranks * slots_per_rank
    rows = []
    for _ in range(num_layers):
        row = np.full(num_slots, -1)
        row[:num_experts] = np.arange(num_experts)
        extra = rng.integers(0, num_experts, num_slots - num_experts)
        row[num_experts:] = np.where(rng.random(len(extra)) < share_filled, extra, -1)
        rows.append(rng.permutation(row))
    return Placement(num_ranks, num_nodes, num_experts, np.array(rows))


def by_rank(map_LS, num_ranks, ranks_in_all):
    """What stands on each rank, whatever the order of slots."""
    layers = []
    for row in map_LS:
        parts = row.reshape(num_ranks, -1).tolist()
        parts += [[]] * (ranks_in_all - num_ranks)
        layers.append([Counter(e for e in part if e >= 0) for part in parts])
    return layers


def check_legal(plan: MigrationPlan, target: Placement, room_R, round_bytes=None, distance_RR=None):
    """Replay the plan copy by copy against a plain dictionary of slots; the oracle for every promise."""
    num_layers, num_ranks, _ = plan.start_LRs.shape
    weights = plan.start_LRs.copy()  # what is physically in each slot
    served = plan.start_LRs.copy()  # what routers dispatch by
    lost = {(layer, e) for layer in range(num_layers) for e in range(plan.num_experts) if e not in served[layer]}
    for index, each in enumerate(plan.rounds):
        assert each.copies or each.dropped
        if round_bytes is not None:
            assert each.size_bytes <= round_bytes
        for slot in each.retired:
            assert served[slot] >= 0
            served[slot] = -1
        assert (plan.map_during(index).reshape(served.shape) == served).all()
        written = {(c.layer, c.rank, c.slot) for c in each.copies}
        assert len(written) == len(each.copies)
        for copy in each.copies:
            # Prefix: routers may be asked to stop or to go on here; everything served is intact.
            for layer in range(num_layers):
                missing = set(range(plan.num_experts)) - set(served[layer].ravel().tolist())
                assert {(layer, e) for e in missing} <= lost
            assert ((served == -1) | (served == weights)).all()
            assert served[copy.layer, copy.rank, copy.slot] == -1
            assert copy.slot < room_R[copy.rank]
            if copy.source_rank < 0:
                assert (copy.layer, copy.expert) in lost
                assert copy.nearness == "checkpoint"
            else:
                assert served[copy.layer, copy.source_rank, copy.source_slot] == copy.expert
                if distance_RR is not None:
                    holders = np.flatnonzero((served[copy.layer] == copy.expert).any(1))
                    nearest = min(distance_RR[h, copy.rank] for h in holders)
                    assert distance_RR[copy.source_rank, copy.rank] == nearest
            weights[copy.layer, copy.rank, copy.slot] = copy.expert
        for copy in each.copies:
            served[copy.layer, copy.rank, copy.slot] = copy.expert
            lost.discard((copy.layer, copy.expert))
        for slot in each.dropped:
            assert served[slot] >= 0
            served[slot] = -1
        assert (plan.map_after(index + 1).reshape(served.shape) == served).all()
        if not lost:
            plan.placement_after(index + 1).check()
    assert not lost
    assert by_rank(plan.final.physical_to_logical_map, num_ranks, num_ranks) == by_rank(
        target.physical_to_logical_map, target.num_ranks, num_ranks
    )


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**31),
    num_layers=st.integers(1, 3),
    num_ranks=st.integers(1, 5),
    slots_per_rank=st.integers(1, 5),
    spare=st.integers(0, 6),
    share_filled=st.sampled_from([0.0, 0.5, 1.0]),
    budget=st.sampled_from([None, 1, 2, 5]),
)
def test_legal_at_every_prefix_and_ends_at_the_target(
    seed, num_layers, num_ranks, slots_per_rank, spare, share_filled, budget
):
    rng = np.random.default_rng(seed)
    num_experts = max(1, num_ranks * slots_per_rank - spare)
    sizes = rng.integers(1, 100, num_layers)
    current, target = (
        random_placement(rng, num_layers, num_experts, num_ranks, slots_per_rank, share_filled=share_filled)
        for _ in range(2)
    )
    round_bytes = None if budget is None else int(sizes.max()) * budget
    arguments = {"expert_bytes": sizes.tolist(), "round_bytes": round_bytes}
    start, end = (by_rank(p.physical_to_logical_map, num_ranks, num_ranks) for p in (current, target))
    if num_experts == num_ranks * slots_per_rank and start != end:
        with pytest.raises(MigrationError, match=rf"give shards slots_per_rank \+ 1 = {slots_per_rank + 1} slots"):
            plan_migration(current, target, **arguments)
        arguments["scratch_slots"], slots_per_rank = 1, slots_per_rank + 1
    plan = plan_migration(current, target, **arguments)
    check_legal(plan, target, [slots_per_rank] * num_ranks, round_bytes)
    if start == end:
        assert plan.rounds == ()
    assert plan_migration(current, target, **arguments).rounds == plan.rounds


@settings(max_examples=60)
@given(seed=st.integers(0, 2**31), extra=st.lists(st.integers(0, 2), min_size=4, max_size=4))
def test_full_shards_move_through_spare_room(seed, extra):
    rng = np.random.default_rng(seed)
    current, target = (random_placement(rng, 1, 12, 4, 3) for _ in range(2))
    room = [3 + more for more in extra]
    assume(any(extra))
    check_legal(plan_migration(current, target, expert_bytes=7, room=room), target, room)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**31), lost=st.integers(0, 5), budget=st.sampled_from([None, 10, 30]))
def test_lost_ranks_are_no_source_and_their_experts_come_back_first(seed, lost, budget):
    rng = np.random.default_rng(seed)
    current = random_placement(rng, 2, 10, 6, 3, num_nodes=3)
    rows = []
    for _ in range(2):
        experts = np.concatenate([np.arange(10), rng.integers(0, 10, 5)])
        row = np.full((6, 3), -1)
        row[np.arange(6) != lost] = rng.permutation(experts).reshape(5, 3)
        rows.append(row.ravel())
    target = Placement(6, 3, 10, np.array(rows))
    plan = plan_migration(current, target, expert_bytes=10, round_bytes=budget, lost_ranks=[lost])
    check_legal(plan, target, [0 if rank == lost else 3 for rank in range(6)], budget)


def test_nearest_source_is_taken():
    topology = Topology(np.arange(8) // 2, np.arange(4) // 2, np.ones(8), np.ones(8))
    rng = np.random.default_rng(5)
    for _ in range(20):
        current, target = (random_placement(rng, 1, 10, 8, 2, num_nodes=4) for _ in range(2))
        plan = plan_migration(current, target, expert_bytes=3, topology=topology)
        check_legal(plan, target, [2] * 8, distance_RR=topology.distance_RR)
        assert sum(plan.bytes_by_nearness().values()) == plan.size_bytes == 3 * plan.num_copies


def test_two_experts_change_places_through_a_spare_slot():
    current = Placement(3, 1, 2, np.array([[0, 1, -1]]))
    plan = plan_migration(current, Placement(3, 1, 2, np.array([[1, 0, -1]])), expert_bytes=5)
    assert [[(c.expert, c.source_rank, c.rank) for c in r.copies] for r in plan.rounds] == [
        [(0, 0, 2)],
        [(1, 1, 0)],
        [(0, 2, 1)],
    ]
    assert plan.rounds[1].retired == ((0, 0, 0),)
    assert plan.rounds[2].dropped == ((0, 2, 0),)


def test_a_cycle_without_an_empty_slot_borrows_a_replica():
    # Experts 0 and 1 change places; expert 2 has two slots, one of which makes way and is restored.
    current = Placement(4, 1, 3, np.array([[0, 1, 2, 2]]))
    target = Placement(4, 1, 3, np.array([[1, 0, 2, 2]]))
    plan = plan_migration(current, target, expert_bytes=5)
    check_legal(plan, target, [1] * 4)
    assert plan.num_copies == 4


def test_spare_room_on_every_shard_lets_them_change_side_by_side():
    rng = np.random.default_rng(1)
    current, target = (random_placement(rng, 1, 64, 8, 8) for _ in range(2))
    plan = plan_migration(current, target, expert_bytes=1, room=9)
    check_legal(plan, target, [9] * 8)
    assert len(plan.rounds) <= 12
    moved = sum((want - have).total() for have, want in zip(
        by_rank(current.physical_to_logical_map, 8, 8)[0], by_rank(target.physical_to_logical_map, 8, 8)[0],
        strict=True,
    ))  # fmt: skip
    assert plan.num_copies == moved  # nothing is copied twice


@pytest.mark.parametrize(("before", "after"), [(4, 6), (6, 4)])
def test_ranks_are_added_and_drained(before, after):
    current, target = (Placement.linear(2, 12, ranks, ranks // 2) for ranks in (before, after))
    plan = plan_migration(current, target, expert_bytes=1, room=4)
    check_legal(plan, target, [4] * 6)
    assert plan.final.num_ranks == 6


def test_slots_of_a_rank_have_no_order():
    current = Placement(2, 1, 4, np.array([[0, 1, 2, 3]]))
    assert plan_migration(current, Placement(2, 1, 4, np.array([[1, 0, 3, 2]])), expert_bytes=1).rounds == ()


def test_a_layer_is_finished_before_the_next_begins_where_slots_allow():
    rng = np.random.default_rng(3)
    current, target = (random_placement(rng, 3, 12, 4, 5) for _ in range(2))
    plan = plan_migration(current, target, expert_bytes=1, round_bytes=2, layer_order=[2, 0, 1])
    first_seen = list(dict.fromkeys(copy.layer for each in plan.rounds for copy in each.copies))
    assert first_seen == [2, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"expert_bytes": 0}, "expert_bytes is 0"),
        ({"expert_bytes": 8, "round_bytes": 7}, "round_bytes is 7, less than one expert's 8"),
        (
            {"expert_bytes": 1, "room": 3, "scratch_slots": 1},
            "scratch_slots is 1, expected 0 or more, and 0 where room",
        ),
        ({"expert_bytes": 1, "scratch_slots": -1}, "scratch_slots is -1"),
        ({"expert_bytes": 1, "room": 1}, "rank 0 has room for 1 slots, 2 are used"),
        ({"expert_bytes": 1, "room": [2, 2, 2]}, "room is given for 3 ranks, there are 2"),
        ({"expert_bytes": 1, "lost_ranks": [1]}, "puts experts on rank 1, which is lost"),
        ({"expert_bytes": 1, "lost_ranks": [2]}, "lost rank 2 is out of range"),
        ({"expert_bytes": 1, "layer_order": [1]}, "layer_order must name each of 1 layers once"),
        ({"expert_bytes": 1, "topology": Topology.uniform(3)}, "the topology has 3 ranks, the migration 2"),
        ({"expert_bytes": 1}, "layer 0: 4 experts fill all 4 slots"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(arguments, message):
    current = Placement(2, 1, 4, np.array([[0, 1, 2, 3]]))
    with pytest.raises(MigrationError, match=message) as caught:
        plan_migration(current, Placement(2, 1, 4, np.array([[0, 2, 1, 3]])), **arguments)
    assert "\n" not in str(caught.value)


def test_other_models_and_other_nodes_are_refused():
    current = Placement.linear(2, 4, 4, 2)
    with pytest.raises(
        MigrationError, match="the current placement is for 2 layers of 4 experts, the target for 1 of 4"
    ):
        plan_migration(current, Placement.linear(1, 4, 4, 2), expert_bytes=1)
    with pytest.raises(MigrationError, match="rank 2 is on node 1 in the current placement, on node 0 in the target"):
        plan_migration(current, Placement.linear(2, 4, 4, 1), expert_bytes=1)
    with pytest.raises(ValueError, match="5 rounds are asked for"):
        plan_migration(current, current, expert_bytes=1).map_after(5)
