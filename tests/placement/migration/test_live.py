"""Migrations of a live service: partial starts, holes, uneven nodes, one round at a time, the most valuable first."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from placement.migration.plan import Migration, MigrationError, plan_migration
from placement.placement import Placement


def random_rows(rng, num_layers, num_experts, slots_R, width, partial):
    """int [L, R, width]: experts at random in the slots that ranks have, all of them unless partial."""
    map_LRs = np.full((num_layers, len(slots_R), width), -1)
    where = [(rank, slot) for rank, slots in enumerate(slots_R) for slot in range(slots)]
    for layer in range(num_layers):
        order = rng.permutation(len(where))
        filled = int(rng.integers(0 if partial else num_experts, len(where) + 1))
        experts = rng.permutation(num_experts) if not partial else rng.integers(0, num_experts, len(where))
        experts = np.concatenate([experts, rng.integers(0, num_experts, len(where))])
        for expert, index in zip(experts[:filled], order, strict=False):
            rank, slot = where[index]
            if expert not in map_LRs[layer, rank] or not partial:
                map_LRs[layer, rank, slot] = expert
    return map_LRs


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**31),
    slots_R=st.lists(st.integers(0, 5), min_size=2, max_size=7),
    leaves=st.integers(0, 3),
    budget=st.sampled_from([None, 1, 3]),
    rank_budget=st.sampled_from([None, 1, 2]),
    weighted=st.booleans(),
)
def test_ranks_come_and_go_anywhere(seed, slots_R, leaves, budget, rank_budget, weighted):
    """Replayed copy by copy: what was served is served at every moment, bounds hold, the end is the target."""
    rng = np.random.default_rng(seed)
    width, num_ranks = max(max(slots_R), 1), len(slots_R)
    after_R = [0 if rank < leaves else slots for rank, slots in enumerate(slots_R)]
    num_experts = sum(after_R) - 1  # one slot more than experts, so that there is an order
    if num_experts < 1:
        return
    nodes = tuple(rng.integers(0, 3, num_ranks).tolist())
    start = random_rows(rng, 2, num_experts, slots_R, width, partial=True)
    wanted = random_rows(rng, 2, num_experts, after_R, width, partial=False)
    current = Placement(num_ranks, 3, num_experts, start.reshape(2, -1), nodes=nodes, partial=True)
    target = Placement(num_ranks, 3, num_experts, wanted.reshape(2, -1), nodes=nodes)
    size = 10
    values = {"load_LE": rng.random((2, num_experts)), "value_LE": rng.random((2, num_experts))} if weighted else {}
    migration = Migration(
        current,
        target,
        expert_bytes=size,
        room=slots_R,
        round_bytes=None if budget is None else budget * size,
        rank_bytes=None if rank_budget is None else rank_budget * size,
        **values,
    )
    served, weights = start.copy(), start.copy()
    copies_left = migration.copies_left
    while (each := migration.next_round()) is not None:
        before = [set(layer.ravel().tolist()) for layer in served]
        for slot in each.retired:
            served[slot] = -1
        sent, received = Counter(), Counter()
        for copy in each.copies:
            assert served[copy.layer, copy.rank, copy.slot] == -1
            assert copy.slot < slots_R[copy.rank]
            if copy.source_rank >= 0:
                assert served[copy.layer, copy.source_rank, copy.source_slot] == copy.expert
                sent[copy.source_rank] += 1
            else:
                assert copy.expert not in served[copy.layer]
            received[copy.rank] += 1
            weights[copy.layer, copy.rank, copy.slot] = copy.expert
            assert ((served == -1) | (served == weights)).all()
        for layer, experts in enumerate(before):
            assert experts - set(served[layer].ravel().tolist()) <= {-1}
        assert budget is None or len(each.copies) <= budget
        assert rank_budget is None or max([*sent.values(), *received.values()], default=0) <= rank_budget
        for copy in each.copies:
            served[copy.layer, copy.rank, copy.slot] = copy.expert
        for slot in each.dropped:
            served[slot] = -1
        for layer, experts in enumerate(before):
            assert experts - set(served[layer].ravel().tolist()) <= {-1}
        assert migration.bytes_left == size * migration.copies_left
    assert migration.done
    assert migration.copies_left == 0 <= copies_left
    for layer in range(2):
        for rank in range(num_ranks):
            assert sorted(served[layer, rank][served[layer, rank] >= 0]) == sorted(
                wanted[layer, rank][wanted[layer, rank] >= 0]
            )


def test_what_nobody_holds_comes_first_and_of_that_the_most_used():
    # Rank 0 keeps experts 0 and 1; experts 2 to 5 are held by nobody; rank 1 gets a replica of 0 as well.
    current = Placement(2, 1, 6, np.array([[0, 1, -1, -1, -1, -1, -1, -1, -1, -1]]), partial=True)
    target = Placement(2, 1, 6, np.array([[0, 1, -1, -1, -1, 0, 2, 3, 4, 5]]))
    load = np.array([[100.0, 1, 5, 9, 1, 7]])
    plan = plan_migration(current, target, expert_bytes=1, round_bytes=1, load_LE=load)
    assert [each.copies[0].expert for each in plan.rounds] == [3, 5, 2, 4, 0]
    assert [each.copies[0].nearness for each in plan.rounds] == ["checkpoint"] * 4 + ["node"]
    assert plan.placement_after(3).partial
    assert not plan.placement_after(4).partial


def test_sole_copies_of_a_leaving_rank_come_before_moves_between_ranks_that_stay():
    current = Placement(3, 1, 4, np.array([[0, 1, -1, 2, -1, -1, 3, 0, -1]]))
    target = Placement(3, 1, 4, np.array([[1, 2, 3, 0, 2, -1, -1, -1, -1]]))
    plan = plan_migration(current, target, expert_bytes=1, round_bytes=1)
    assert plan.rounds[0].copies[0].expert == 3  # expert 0 is on rank 0 too


def test_a_copy_that_relieves_the_heaviest_rank_comes_before_others():
    # Rank 0 has loads 8 and 8, rank 1 has 1 and 1; rank 2 is new and takes one of each.
    current = Placement(2, 1, 4, np.array([[0, 1, -1, 2, 3, -1]]))
    target = Placement(3, 1, 4, np.array([[0, -1, -1, 2, -1, -1, 3, 1, -1]]))
    arguments = {"expert_bytes": 1, "round_bytes": 1}
    load = np.array([[8.0, 8, 1, 1]])
    first = plan_migration(current, target, **arguments, load_LE=load).rounds[0].copies[0]
    assert (first.expert, first.source_rank, first.rank) == (1, 0, 2)
    worth = np.array([[0.0, 0, 0, 5]])
    first = plan_migration(current, target, **arguments, load_LE=load, value_LE=worth).rounds[0].copies[0]
    assert first.expert == 3


def test_a_further_replica_of_what_came_from_the_checkpoint_comes_from_a_shard():
    current = Placement(3, 1, 2, np.array([[0, -1, -1]]), partial=True)
    target = Placement(3, 1, 2, np.array([[0, 1, 1]]))
    plan = plan_migration(current, target, expert_bytes=1)
    assert [[copy.nearness for copy in each.copies] for each in plan.rounds] == [["checkpoint"], ["node"]]


def test_no_rank_gets_more_than_its_share_of_a_round():
    # Four ranks hold everything, four new ones take half of it: a bound of one copy a rank uses all links each round.
    current = Placement(4, 1, 16, np.arange(16)[None])
    row = [0, 1, -1, -1, 4, 5, -1, -1, 8, 9, -1, -1, 12, 13, -1, -1]
    row += [2, 6, -1, -1, 3, 7, -1, -1, 10, 14, -1, -1, 11, 15, -1, -1]
    target = Placement(8, 1, 16, np.array([row]))
    plan = plan_migration(current, target, expert_bytes=5, rank_bytes=5)
    assert [len(each.copies) for each in plan.rounds] == [4, 4]
    for each in plan.rounds:
        assert len({copy.source_rank for copy in each.copies}) == len({copy.rank for copy in each.copies}) == 4


def test_a_layer_that_cannot_move_does_not_keep_the_others_from_it():
    # Layer 0 has a free slot, but not for experts 0 and 1 of layer 1, which is full once expert 2 is back.
    current = Placement(3, 1, 3, np.array([[0, 1, -1], [0, 1, -1]]), partial=True)
    target = Placement(3, 1, 3, np.array([[0, 1, 2], [1, 0, 2]]))
    migration = Migration(current, target, expert_bytes=1)
    first = migration.next_round()
    assert {(copy.layer, copy.expert) for copy in first.copies} == {(0, 2), (1, 2)}
    with pytest.raises(MigrationError, match="layer 1: no slot is spare, so no expert can move"):
        migration.next_round()
    assert migration.copies_left == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank_bytes": 7}, "rank_bytes is 7, less than one expert's 8"),
        ({"load_LE": np.ones((1, 3))}, r"load_LE is \[1, 3\], expected \[1, 2\] finite numbers"),
        ({"value_LE": np.full((1, 2), np.nan)}, r"value_LE is \[1, 2\], expected \[1, 2\] finite numbers"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments, message):
    current = Placement(2, 1, 2, np.array([[0, 1, -1, -1]]))
    with pytest.raises(MigrationError, match=message):
        Migration(current, current, expert_bytes=8, **arguments)


def test_a_target_that_lacks_an_expert_and_a_shard_that_changed_nodes_are_refused():
    current = Placement(2, 2, 2, np.array([[0, 1]]))
    with pytest.raises(MigrationError, match="layer 0: the target has no slot for expert 1"):
        Migration(current, Placement(2, 2, 2, np.array([[0, -1]]), partial=True), expert_bytes=1)
    moved = Placement(2, 2, 2, np.array([[0, 1]]), nodes=(1, 1))
    with pytest.raises(MigrationError, match="rank 0 is on node 0 in the current placement, on node 1 in the target"):
        Migration(current, moved, expert_bytes=1)
    # Lost and started again elsewhere, it is another shard.
    back = Placement(3, 2, 2, np.array([[-1, -1, 0, 1, -1, -1]]), nodes=(1, 1, 0))
    plan = plan_migration(current, back, expert_bytes=1, lost_ranks=[0])
    assert plan.nodes == (1, 1, 0)
    assert [(c.expert, c.source_rank) for each in plan.rounds for c in each.copies] == [(0, -1)]
