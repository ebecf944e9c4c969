"""Targets for other sets of shards: complete, spare where it can be, even, near what is held, refused by name."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from placement.placement import Placement
from placement.rule.evaluate import evaluate
from placement.search.few_copies.resize import copies_between, resize
from placement.traces.trace import ActivationTrace


def held_by(placement: Placement) -> list[list[list[int]]]:
    """The experts of each layer and rank."""
    map_LRs = placement.physical_to_logical_map.reshape(placement.num_layers, placement.num_ranks, -1)
    return [[[e for e in slots if e >= 0] for slots in ranks] for ranks in map_LRs.tolist()]


def rank_loads(ranks: list[list[int]], load_E) -> list[float]:
    """Loads by an even split, the slow way."""
    count = [sum(slots.count(e) for slots in ranks) for e in range(len(load_E))]
    return [sum(load_E[e] / count[e] for e in slots) for slots in ranks]


def balancedness(placement: Placement, load_LE=None, ranks=None) -> float:
    """Of the worst layer, over some of the ranks."""
    worst = 1.0
    for layer, held in enumerate(held_by(placement)):
        load_E = np.ones(placement.num_experts) if load_LE is None else load_LE[layer]
        load = [load for rank, load in enumerate(rank_loads(held, load_E)) if ranks is None or rank in ranks]
        worst = min(worst, sum(load) / len(load) / max(load))
    return worst


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**31),
    before=st.integers(1, 6),
    slots_R=st.lists(st.integers(0, 6), min_size=1, max_size=7),
    gone=st.sets(st.integers(0, 6), max_size=3),
    min_replicas=st.integers(1, 3),
    spare_slots=st.integers(0, 2),
    num_nodes=st.integers(1, 3),
    shape=st.sampled_from(["uniform", "skewed", "zeros"]),
    share_protected=st.sampled_from([0.0, 0.3]),
)
@example(872951562, 6, [0, 4, 6, 5, 2], set(), 2, 1, 1, "skewed", 0.3)
@example(1255680228, 5, [6, 6, 0, 3], {5}, 1, 1, 1, "zeros", 0.3)
@example(1095915209, 4, [5, 6, 4, 1, 6], set(), 2, 1, 1, "uniform", 0.3)
@example(1482488899, 4, [3, 3, 1, 2, 6, 6], {0, 5}, 2, 1, 1, "zeros", 0.0)
def test_the_promises_hold_whatever_is_held(
    seed, before, slots_R, gone, min_replicas, spare_slots, num_nodes, shape, share_protected
):
    rng = np.random.default_rng(seed)
    num_layers, num_ranks = 2, len(slots_R)
    usable = [rank not in gone for rank in range(num_ranks)]
    room = [slots if ok else 0 for slots, ok in zip(slots_R, usable, strict=True)]
    num_experts = max(1, int(sum(room) * rng.uniform(0.2, 1.0)))
    width = int(rng.integers(1, 6))
    current = Placement(
        before, 1, num_experts, rng.integers(-1, num_experts, (num_layers, before * width)), partial=True
    )
    load = {
        "uniform": None,
        "skewed": rng.lognormal(0, 1, (num_layers, num_experts)),
        "zeros": rng.integers(0, 2, (num_layers, num_experts)),
    }[shape]
    nodes = tuple(rng.integers(0, num_nodes, num_ranks).tolist())
    protect = rng.random((num_layers, num_experts)) < share_protected
    arguments = {
        "slots_R": slots_R,
        "usable_R": usable,
        "load_LE": load,
        "min_replicas": min_replicas,
        "spare_slots": spare_slots,
        "nodes": nodes,
        "num_nodes": num_nodes,
        "protect_LE": protect,
    }
    asked = needed = np.maximum(np.where(protect, 2, 1), min_replicas)
    try:
        result = resize(current, **arguments)
    except ValueError:
        if sum(room) < num_experts:
            return
        # With replicas of equal number, there is an order exactly if the slots that can be of use are enough.
        if (needed == min_replicas).all():
            useful = sum(min(slots, num_experts) for slots in room)
            assert useful < num_experts * min_replicas or min_replicas > sum(slots > 0 for slots in room)
        result = resize(current, **arguments, fewer_replicas=True)
        needed = np.ones_like(asked)  # of the others as many as fit
    result.check()
    assert not result.partial
    assert result.num_ranks == num_ranks
    used_nodes = len({nodes[rank] for rank in range(num_ranks) if room[rank]})
    for layer, held in enumerate(held_by(result)):
        assert all(len(slots) <= room[rank] for rank, slots in enumerate(held))
        assert all(len(set(slots)) == len(slots) for slots in held)
        ranks_of = [[rank for rank, slots in enumerate(held) if e in slots] for e in range(num_experts)]
        for expert, ranks in enumerate(ranks_of):
            assert len(ranks) >= needed[layer, expert]
        over = sum(max(len(slots) - max(room[rank] - spare_slots, 0), 0) for rank, slots in enumerate(held))
        if over and used_nodes == 1:
            # A spare slot is used only if no other rank could take its expert, nor any expert do with less.
            for rank, slots in enumerate(held):
                if len(slots) <= max(room[rank] - spare_slots, 0):
                    continue
                assert all(len(ranks_of[e]) <= asked[layer, e] for e in slots)
                for other, there in enumerate(held):
                    if len(there) < max(room[other] - spare_slots, 0):
                        assert set(slots) <= set(there)
    again = resize(current, **arguments, fewer_replicas=True)
    assert again == resize(current, **arguments, fewer_replicas=True)


@pytest.mark.parametrize("start", [3, 5])
def test_sixteen_experts_come_out_even_on_five_ranks_of_seven_slots(start):
    target = resize(Placement.linear(4, 16, start), slots_R=[7] * 5, usable_R=[True] * 5)
    assert balancedness(target) >= 0.95
    assert all(len(slots) <= 6 for layer in held_by(target) for slots in layer)


def test_three_to_five_and_back_ten_times_does_not_degrade():
    """The tiny model: 4 layers, 16 experts, top-4, 7 slots; by the rule itself on tokens that choose at random."""
    rng = np.random.default_rng(4)
    ids = np.array([[rng.choice(16, 4, replace=False) for _ in range(4)] for _ in range(1500)], np.int16)
    trace = ActivationTrace(ids, 16)
    placement = Placement.linear(4, 16, 3)
    copies: dict[int, list[int]] = {3: [], 5: []}
    for step in range(20):
        ranks = 5 if step % 2 == 0 else 3
        target = resize(placement, slots_R=[7] * 5, usable_R=[rank < ranks for rank in range(5)])
        copies[ranks].append(copies_between(placement, target))
        load_LR = evaluate(target, trace).load_LR[:, :ranks]
        assert (load_LR.mean(1) / load_LR.max(1)).min() >= 0.9
        assert balancedness(target, ranks=range(ranks)) >= 0.95
        placement = target
    for counts in copies.values():
        assert max(counts[1:]) <= counts[0]


def test_nothing_moves_where_all_is_well():
    placement = resize(Placement.linear(2, 16, 4), slots_R=[6] * 4, usable_R=[True] * 4)
    assert copies_between(Placement.linear(2, 16, 4), placement) == 0
    assert resize(placement, slots_R=[6] * 4, usable_R=[True] * 4) == placement


def test_a_successor_takes_the_experts_of_its_rank_as_they_are():
    current = Placement.linear(3, 16, 4)
    target = resize(
        current, slots_R=[5] * 5, usable_R=[True, False, True, True, True], successor_of={1: 4}, spare_slots=1
    )
    for before, after in zip(held_by(current), held_by(target), strict=True):
        assert after[1] == []
        assert sorted(after[4]) == before[1]
        assert [sorted(after[rank]) for rank in (0, 2, 3)] == [before[rank] for rank in (0, 2, 3)]
    # A rank that is not in the result any more has a successor as well.
    target = resize(current, slots_R=[8] * 3, usable_R=[True] * 3, successor_of={3: 2}, spare_slots=0, tolerance=0.9)
    assert all(set(layer[2]) >= {8, 9, 10, 11} for layer in held_by(target))


def test_faster_ranks_take_more():
    target = resize(
        Placement.linear(1, 24, 3), slots_R=[20] * 3, usable_R=[True] * 3, speed_R=[2.0, 1.0, 1.0], spare_slots=1
    )
    load = rank_loads(held_by(target)[0], np.ones(24))
    assert load == pytest.approx([12, 6, 6], rel=0.06)


def test_hot_experts_get_replicas_before_others_fill_the_slots():
    load = np.ones((1, 16))
    load[0, 0] = 12.0  # 27 in all: an even load of a rank is 6.75
    target = resize(Placement.linear(1, 16, 4), slots_R=[6] * 4, usable_R=[True] * 4, load_LE=load)
    assert balancedness(target, load) >= 0.95
    assert target.logical_replica_count[0, 0] >= 2


def test_replicas_are_on_different_nodes_where_the_nodes_allow():
    current = Placement.linear(2, 8, 4, 2)
    nodes = (0, 0, 1, 1)
    target = resize(
        current, slots_R=[5] * 4, usable_R=[True] * 4, min_replicas=2, nodes=nodes, num_nodes=2, spare_slots=1
    )
    for layer in held_by(target):
        for expert in range(8):
            assert {nodes[rank] for rank, slots in enumerate(layer) if expert in slots} == {0, 1}
    # One node is too small for that; different ranks are the best there is.
    target = resize(
        current, slots_R=[8, 8, 4, 0], usable_R=[True] * 4, min_replicas=2, nodes=nodes, num_nodes=2, spare_slots=0
    )
    assert (target.logical_replica_count >= 2).all()


def test_only_protected_experts_get_a_second_replica():
    protect = np.zeros((1, 8), bool)
    protect[0, [1, 6]] = True
    target = resize(Placement.linear(1, 8, 4), slots_R=[4] * 4, usable_R=[True] * 4, protect_LE=protect, tolerance=0.6)
    assert target.logical_replica_count[0].tolist() == [1, 2, 1, 1, 1, 1, 2, 1]


def fewest_copies(current: Placement, slots: int, num_ranks: int, load_E, allowed: float) -> int:
    """By trying everything: copies to a placement without replicas, no rank above `allowed`."""
    held = held_by(current)[0] + [[]] * num_ranks
    best = 10**9
    for ranks in itertools.product(range(num_ranks), repeat=len(load_E)):
        if max(ranks.count(rank) for rank in range(num_ranks)) > slots:
            continue
        load = [sum(load_E[e] for e, at in enumerate(ranks) if at == rank) for rank in range(num_ranks)]
        if max(load) <= allowed + 1e-9:
            best = min(best, sum(e not in held[rank] for e, rank in enumerate(ranks)))
    return best


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), before=st.integers(1, 3), after=st.integers(1, 3), even=st.booleans())
def test_about_as_few_copies_as_the_fewest_for_the_same_balance(seed, before, after, even):
    """Seven experts without room for replicas, against all 3^7 placements."""
    rng = np.random.default_rng(seed)
    load = np.ones((1, 7)) if even else rng.uniform(0.5, 1.5, (1, 7))
    slots = -(-7 // after) + (1 if after > 1 and not even else 0)
    start = rng.permutation(np.concatenate([np.arange(7), np.full(before * 7 - 7, -1)]))
    current = Placement(before, 1, 7, start[None])
    target = resize(current, slots_R=[slots] * after, usable_R=[True] * after, load_LE=load, spare_slots=0)
    if (target.logical_replica_count > 1).any():
        return
    most = max(rank_loads(held_by(target)[0], load[0]))
    fewest = fewest_copies(current, slots, after, load[0], most)
    made = copies_between(current, target)
    assert made >= fewest
    assert made <= (fewest if even else fewest + 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slots_R": [4] * 3, "usable_R": [True] * 3}, "3 shards have 12 slots in a layer for 16 experts: add shards"),
        ({"slots_R": [9] * 3, "usable_R": [True, False, False]}, "1 shard has 9 slots in a layer for 16 experts"),
        (
            {"slots_R": [9] * 3, "usable_R": [True] * 3, "min_replicas": 2},
            "3 shards have 27 slots in a layer for 16 experts with 32 replicas",
        ),
        (
            {"slots_R": [16] * 2, "usable_R": [True] * 2, "min_replicas": 3},
            "3 replicas on different shards need 3 shards, there are 2",
        ),
        ({"slots_R": [9] * 3, "usable_R": [True] * 2}, "usable_R names 2 ranks, slots_R 3"),
        ({"slots_R": [9] * 3, "usable_R": [True] * 3, "min_replicas": 0}, "min_replicas is 0, expected at least 1"),
        ({"slots_R": [9] * 3, "usable_R": [True] * 3, "num_nodes": 2}, "3 ranks cannot be dealt evenly to 2 nodes"),
        ({"slots_R": [9] * 3, "usable_R": [True] * 3, "load_LE": np.ones((1, 3))}, r"load_LE is \[1, 3\], expected"),
        (
            {"slots_R": [9] * 3, "usable_R": [True] * 3, "successor_of": {0: 1}},
            "rank 1 cannot succeed rank 0: the one must be usable, the other not",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        resize(Placement.linear(1, 16, 4), **arguments)


def test_replicas_that_do_not_fit_are_left_out_if_asked_the_hottest_last():
    load = np.arange(1.0, 17)[None]
    target = resize(
        Placement.linear(1, 16, 4),
        slots_R=[9] * 3,
        usable_R=[True] * 3,
        min_replicas=2,
        load_LE=load,
        fewer_replicas=True,
    )
    count = target.logical_replica_count[0]
    assert count.min() == 1
    assert count.sum() == 27
    assert set(np.flatnonzero(count >= 2)) >= set(range(6, 16))
