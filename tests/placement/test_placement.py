"""Placement tables: what they derive, what they refuse, and the linear placement with its replicas."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.placement import Placement


def worked_example() -> Placement:
    # Layer 0: rank 0 holds 0, 1; rank 1 holds 2 and a replica of 0; layer 1 has an empty slot.
    return Placement(2, 1, 3, np.array([[0, 1, 2, 0, -1, 1], [2, 2, 0, 1, 0, -1]][0:2], np.int32))


def test_a_worked_example():
    placement = worked_example()
    assert (placement.num_layers, placement.num_slots, placement.slots_per_rank) == (2, 6, 3)
    assert placement.logical_replica_count.tolist() == [[2, 2, 1], [2, 1, 2]]
    assert placement.logical_to_physical_map.tolist() == [[[0, 3], [1, 5], [2, -1]], [[2, 4], [3, -1], [0, 1]]]
    assert placement.slots_LER.tolist() == [[[0, 3], [1, 5], [2, -1]], [[2, 4], [-1, 3], [0, -1]]]
    assert placement.experts_of_rank(1).tolist() == [[0, -1, 1], [1, 0, -1]]
    assert placement.slots_LER.dtype == placement.logical_replica_count.dtype == np.int32


def test_round_trip(tmp_path):
    placement = worked_example()
    placement.save(tmp_path / "placement.json")
    assert Placement.load(tmp_path / "placement.json") == placement
    data = json.loads((tmp_path / "placement.json").read_text())
    del data["num_nodes"], data["num_experts"]
    assert Placement.from_json(data | {"note": "read by others"}) == placement


@pytest.mark.parametrize(
    ("ranks", "nodes", "experts", "rows", "message"),
    [
        (2, 1, 3, [[0, 1, 2, 3]], "layer 0, rank 1: slot 3 holds expert 3"),
        (2, 1, 3, [[0, 1, 2, -2]], "layer 0, rank 1: slot 3 holds expert -2"),
        (2, 1, 4, [[0, 1, 2, 3], [0, 1, 1, 3]], "layer 1: expert 2 has no slot on any of 2 ranks"),
        (3, 1, 4, [[0, 1, 2, 3]], "4 slots cannot be dealt evenly to 3 ranks"),
        (2, 3, 4, [[0, 1, 2, 3]], "2 ranks cannot be dealt evenly to 3 nodes"),
        (0, 1, 4, [[0, 1, 2, 3]], "num_ranks is 0"),
        (1, 1, 1, [[0.0]], "must be integers"),
        (2, 1, 3, [[2**32, 1, 2, 0]], "holds 0 to 4294967296, expected -1 to 2"),
        (2, 1, 10**12, [[0, 1]], "2 slots cannot hold 1000000000000 experts"),
    ],
)
def test_a_bad_table_is_refused_by_name(ranks, nodes, experts, rows, message):
    with pytest.raises(ValueError, match=message):
        Placement(ranks, nodes, experts, np.array(rows))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "JSON object"),
        ({"num_ranks": 2}, "no 'physical_to_logical_map'"),
        ({"num_ranks": 2.0, "physical_to_logical_map": [[0, 1]]}, "num_ranks is 2.0, expected an integer"),
        ({"num_ranks": 2, "physical_to_logical_map": [[0, 1], [0]]}, "ragged"),
        ({"num_ranks": 2, "physical_to_logical_map": []}, "empty"),
        ({"num_ranks": 2, "physical_to_logical_map": [[None, 1]]}, "must be integers"),
        ({"num_ranks": 2, "physical_to_logical_map": [["a", "b"]]}, "must be integers"),
        ({"num_ranks": 2, "physical_to_logical_map": {"a": 1}}, "must be integers"),
        ({"num_ranks": 2, "physical_to_logical_map": [[2**32, 1]]}, "holds 1 to 4294967296"),
    ],
)
def test_bad_json_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        Placement.from_json(data)


def test_the_map_is_a_read_only_copy():
    rows = np.array([[0, 1]])
    placement = Placement(2, 1, 2, rows)
    rows[0, 0] = 1
    assert placement.physical_to_logical_map[0, 0] == 0
    with pytest.raises(ValueError, match="read-only"):
        placement.physical_to_logical_map[0, 0] = 1


@settings(max_examples=100)
@given(
    num_nodes=st.integers(1, 4),
    ranks_per_node=st.integers(1, 4),
    num_experts=st.integers(1, 40),
    min_replicas=st.integers(1, 4),
)
def test_linear_holds_its_promises(num_nodes, ranks_per_node, num_experts, min_replicas):
    num_ranks = num_nodes * ranks_per_node
    if min_replicas > num_ranks or (num_nodes > 1 and min_replicas > num_nodes):
        with pytest.raises(ValueError, match="replicas on different"):
            Placement.linear(2, num_experts, num_ranks, num_nodes, min_replicas)
        return
    placement = Placement.linear(2, num_experts, num_ranks, num_nodes, min_replicas)
    assert (placement.logical_replica_count == min_replicas).all()
    holds_ER = placement.slots_LER[1] >= 0
    assert (holds_ER.sum(1) == min_replicas).all()
    if num_nodes > 1:
        assert (holds_ER.reshape(num_experts, num_nodes, ranks_per_node).any(2).sum(1) == min_replicas).all()
    if min_replicas > 1:
        for rank in range(num_ranks):
            others_ER = np.delete(placement.slots_LER[0], rank, axis=1)
            assert (others_ER >= 0).any(1).all()


def test_linear_copies_of_one_rank_spread_over_the_survivors():
    placement = Placement.linear(1, 12, 4, min_replicas=2)
    slots_ER = placement.slots_LER[0]
    for rank in range(4):
        elsewhere = [
            int(np.flatnonzero(slots_ER[e] >= 0)[np.flatnonzero(slots_ER[e] >= 0) != rank][0])
            for e in range(rank * 3, rank * 3 + 3)
        ]
        assert sorted(elsewhere) == sorted(set(range(4)) - {rank})


def test_nodes_may_be_uneven():
    placement = Placement(3, 2, 3, np.array([[0, 1, 2]]), nodes=(1, 0, 1))
    assert placement.node_of_rank_R.tolist() == [1, 0, 1]
    assert Placement.from_json(json.loads(json.dumps(placement.to_json()))) == placement
    assert placement != Placement(3, 1, 3, np.array([[0, 1, 2]]))
    for nodes in ((0, 1), (0, 1, 2), (0, -1, 1)):
        with pytest.raises(ValueError, match="expected one of 0 to 1 for each of 3 ranks"):
            Placement(3, 2, 3, np.array([[0, 1, 2]]), nodes=nodes)


def test_speeds_travel_and_tell_what_a_pair_counts():
    plain = Placement.linear(1, 4, 4)
    assert plain.work_R.tolist() == [1, 1, 1, 1]
    assert replace(plain, speeds=(3.0,) * 4) == plain  # equal speeds are none
    unlike = replace(plain, speeds=(1, 2, 0.5, 2))
    assert unlike.work_R.tolist() == [2048, 1024, 4096, 1024]
    assert unlike != plain
    copies = (Placement.from_json(unlike.to_json()), pickle.loads(pickle.dumps(unlike)), unlike.without_ranks([]))
    assert all(copy == unlike and copy.speeds == (1, 2, 0.5, 2) for copy in copies)
    assert replace(plain, speeds=(1, 1e-300, 1, 1)).work_R.tolist() == [1024, 1024 * 10**6, 1024, 1024]
    for speeds in ((1.0, 2.0), (1.0, 0.0, 1.0, 1.0), (1.0, float("nan"), 1.0, 1.0)):
        with pytest.raises(ValueError, match="speeds must be 4 numbers above 0"):
            replace(plain, speeds=speeds)
    with pytest.raises(ValueError, match="speeds is 'fast', expected a list of numbers"):
        Placement.from_json({**plain.to_json(), "speeds": "fast"})


def test_a_partial_placement_may_lack_experts():
    placement = Placement(2, 1, 3, np.array([[0, -1], [-1, -1]]), partial=True)
    assert placement.logical_replica_count.tolist() == [[1, 0, 0], [0, 0, 0]]
    assert placement.slots_LER.tolist() == [[[0, -1], [-1, -1], [-1, -1]], [[-1, -1]] * 3]
    again = Placement.from_json(json.loads(json.dumps(placement.to_json())))
    assert again == placement
    assert again.partial
    assert pickle.loads(pickle.dumps(placement)).partial
    with pytest.raises(ValueError, match="2 slots cannot hold 3 experts"):
        Placement(2, 1, 3, placement.physical_to_logical_map)


def test_from_sets_is_what_ranks_hold():
    held = [[(1, 3), (0, 0), (0, 2)], [], [(0, 1), (1, 0)]]
    placement = Placement.from_sets(held, num_layers=2, num_experts=4, nodes=(0, 0, 1), num_nodes=2)
    assert placement.physical_to_logical_map.tolist() == [[0, 2, -1, -1, 1, -1], [3, -1, -1, -1, 0, -1]]
    assert placement.partial
    assert placement.nodes == (0, 0, 1)
    wide = Placement.from_sets([[(0, 0), (0, 1)]], num_layers=1, num_experts=2, slots_per_rank=3)
    assert (wide.physical_to_logical_map.tolist(), wide.partial) == ([[0, 1, -1]], False)
    nothing = Placement.from_sets([[], []], num_layers=1, num_experts=2)
    assert nothing.physical_to_logical_map.tolist() == [[-1, -1]]
    with pytest.raises(ValueError, match="rank 1 holds expert 4 of layer 0, expected layers 0 to 1 and experts 0 to 3"):
        Placement.from_sets([[], [(0, 4)]], num_layers=2, num_experts=4)


def test_without_ranks_keeps_numbers_and_is_partial_only_where_an_expert_is_lost():
    placement = Placement(3, 1, 2, np.array([[0, 1, 0]]))
    assert placement.without_ranks([2]).physical_to_logical_map.tolist() == [[0, 1, -1]]
    assert not placement.without_ranks([2]).partial
    assert placement.without_ranks([1]).partial
    assert placement.without_ranks([]) == placement
    with pytest.raises(ValueError, match="rank 3 is out of range, expected 0 to 2"):
        placement.without_ranks([3])


def test_tables_agree_with_a_plain_search():
    rng = np.random.default_rng(2)
    map_LS = rng.integers(-1, 5, (3, 12))
    placement = Placement(4, 1, 5, map_LS, partial=True)
    for layer, expert in np.ndindex(3, 5):
        slots = np.flatnonzero(map_LS[layer] == expert)
        assert placement.logical_replica_count[layer, expert] == len(slots)
        for rank in range(4):
            mine = [slot for slot in slots if slot // 3 == rank]
            assert placement.slots_LER[layer, expert, rank] == (mine[0] if mine else -1)
