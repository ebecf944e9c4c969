"""Which placement the shards should have: as they come, go, and are too few."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest

from cluster.mesh.holdings import experts_by_rank
from cluster.mesh.planning import protected_experts
from cluster.mesh.target import Limits, Target, TargetKeeper, numbered_nodes, without_last_ranks
from placement.placement import Placement

LOAD = np.array([[4.0, 3.0, 2.0, 1.0, 1.0, 1.0]])


def keeper(num_ranks: int = 3, slots: int = 4, **limits: float) -> TargetKeeper:
    """Six experts of one layer, in order on ranks with as many slots each."""
    found = TargetKeeper(Limits(**limits))  # type: ignore[arg-type]
    found.set(Target(1, "first", Placement.linear(1, 6, num_ranks), "p"), dict.fromkeys(range(num_ranks), slots))
    return found


def rows(found: TargetKeeper) -> dict[int, set[int]]:
    """Experts by rank; ranks without any are left out."""
    assert found.target is not None
    table = experts_by_rank(found.target.placement)
    return {rank: set(np.flatnonzero(row_LE[0]).tolist()) for rank, row_LE in table.items() if row_LE.any()}


def follow(found: TargetKeeper, ranks: list[int], newcomers: int = 9, slots: int = 4) -> bool:
    return found.follow(dict.fromkeys(ranks, slots), dict.fromkeys(ranks, "n"), newcomers)


def test_without_a_target_there_is_nothing_to_follow() -> None:
    found = TargetKeeper()
    assert not follow(found, [0, 1])
    assert (found.target, found.ranks) == (None, set())


def test_the_same_shards_have_the_same_target() -> None:
    found = keeper()
    assert not follow(found, [0, 1, 2])
    assert found.target is not None
    assert (found.target.version, found.ranks, found.slots_of(1)) == (1, {0, 1, 2}, 4)


def test_no_shards_at_all_change_nothing() -> None:
    found = keeper()
    assert not follow(found, [])
    assert (found.ranks, found.problem) == ({0, 1, 2}, "")


def test_a_newcomer_that_is_wanted_gets_experts() -> None:
    found = keeper(2)
    assert follow(found, [0, 1, 2], newcomers=1)
    assert found.target is not None
    assert (found.target.version, found.target.origin, found.target.policy) == (2, "shards +2", "p")
    assert rows(found).keys() == {0, 1, 2}
    assert set().union(*rows(found).values()) == set(range(6))


@pytest.mark.parametrize("newcomers", [0, -1])
def test_a_newcomer_that_is_not_waits(newcomers: int) -> None:
    found = keeper(2)
    assert not follow(found, [0, 1, 2], newcomers)
    assert found.ranks == {0, 1}


def test_a_newcomer_succeeds_a_leaver_and_gets_what_it_had() -> None:
    found = keeper(3)
    before = rows(found)
    assert follow(found, [0, 2, 5], newcomers=1)
    assert rows(found) == {0: before[0], 2: before[2], 5: before[1]}
    assert found.target is not None
    assert found.target.origin == "shards +5 -1"


def test_the_others_take_over_from_a_leaver() -> None:
    found = keeper(3)
    before = rows(found)
    assert follow(found, [0, 1])
    after = rows(found)
    assert after.keys() == {0, 1}
    assert all(before[rank] <= after[rank] for rank in after), "what is there stays"
    assert set().union(*after.values()) == set(range(6))
    assert found.target is not None
    assert found.target.placement.num_ranks == 2, "ranks at the end that nobody has are gone"


def test_a_hole_between_ranks_stays_until_it_is_taken() -> None:
    found = keeper(3)
    assert follow(found, [0, 2])
    assert rows(found).keys() == {0, 2}
    assert found.target is not None
    assert found.target.placement.num_ranks == 3


def test_shards_of_different_size_hold_no_more_than_they_can() -> None:
    found = keeper(2, spare_slots=0)
    assert found.follow({0: 4, 1: 4, 2: 1}, dict.fromkeys(range(3), "n"), 1)
    assert len(rows(found)[2]) <= 1
    assert found.follow({0: 4, 1: 2, 2: 1}, dict.fromkeys(range(3), "n"), 0), "the same ranks with other shards"
    assert found.target is not None
    assert found.target.origin == "shards resized"
    assert [len(rows(found)[rank]) <= most for rank, most in ((0, 4), (1, 2), (2, 1))] == [True] * 3


def test_too_few_slots_are_a_problem_that_is_told_once_and_ends_with_more(caplog: pytest.LogCaptureFixture) -> None:
    found = keeper(3)
    target = found.target
    with caplog.at_level(logging.ERROR):
        assert not follow(found, [0])
        assert not follow(found, [0])
    assert "4" in found.problem
    assert "6" in found.problem
    assert len(caplog.records) == 1
    assert found.target is target, "the old one stays"
    assert follow(found, [0, 1])
    assert found.problem == ""
    assert set().union(*rows(found).values()) == set(range(6))


def test_the_same_shards_back_after_a_problem_have_a_target_again() -> None:
    found = keeper(3)
    before = rows(found)
    assert not follow(found, [0])
    assert follow(found, [0, 1, 2])
    assert found.problem == ""
    assert rows(found) == before


def test_versions_rise_whoever_sets_them() -> None:
    found = keeper(2)
    placement = Placement.linear(1, 6, 2)
    found.set(Target(1, "command", placement), {0: 4, 1: 4})
    assert found.target is not None
    assert (found.target.version, found.target.origin) == (2, "command")
    found.set(Target(9, "rejoin", placement), {0: 4, 1: 4})
    assert found.target.version == 9
    found.problem = "it does not fit"
    found.set(Target(9, "command", placement), {0: 4, 1: 4})
    assert (found.target.version, found.problem) == (10, "")
    found.keep_policy("q")
    assert (found.target.version, found.target.policy) == (10, "q")


def test_a_target_travels_as_json() -> None:
    for load_LE in (None, LOAD):
        target = Target(3, "command", Placement.linear(1, 6, 2), "p", load_LE)
        again = Target.from_json(target.to_json())
        assert (again.version, again.origin, again.policy) == (3, "command", "p")
        assert again.placement == target.placement
        assert (again.load_LE is None) == (load_LE is None)
        assert load_LE is None or np.array_equal(again.load_LE, load_LE)  # type: ignore[arg-type]


def test_speeds_stay_with_their_ranks_as_shards_come_and_go() -> None:
    found = TargetKeeper()
    assert found.speeds(2) is None
    found.set(Target(1, "first", replace(Placement.linear(1, 6, 3), speeds=(1.0, 0.5, 2.0)), "p"), {0: 4, 1: 4, 2: 4})
    assert found.speeds(4) == (1.0, 0.5, 2.0, 1.0)
    assert follow(found, [0, 1, 3])
    assert found.target is not None
    assert found.target.placement.speeds == (1.0, 0.5, 2.0, 1.0)  # rank 2 is a hole
    assert follow(found, [0, 1])
    assert found.target.placement.speeds == (1.0, 0.5)


def test_replicas_are_kept_where_slots_suffice_and_given_up_before_an_expert_is() -> None:
    found = keeper(3, slots=5, min_replicas=2, spare_slots=1)
    assert follow(found, [0, 1, 2, 3])
    counts = np.zeros(6, int)
    for experts in rows(found).values():
        counts[list(experts)] += 1
    assert counts.min() == 2
    assert follow(found, [0, 1])
    assert set().union(*rows(found).values()) == set(range(6))


@pytest.mark.parametrize(
    ("share", "load_LE", "expected"),
    [(0.0, LOAD, None), (0.3, LOAD, [0]), (0.4, LOAD, [0, 1]), (1.0, LOAD, range(6)), (0.5, None, [0, 1, 2])],
)
def test_the_most_used_experts_are_protected(
    share: float, load_LE: np.ndarray | None, expected: list[int] | None
) -> None:
    protected_LE = protected_experts(Placement.linear(1, 6, 3), load_LE, share)
    if expected is None:
        assert protected_LE is None
    else:
        assert protected_LE is not None
        assert np.flatnonzero(protected_LE[0]).tolist() == list(expected)


def test_protected_experts_get_two_replicas() -> None:
    found = TargetKeeper(Limits(protect=0.5))
    found.set(Target(1, "first", Placement.linear(1, 6, 3), "p", LOAD), dict.fromkeys(range(3), 5))
    assert follow(found, [0, 1, 2, 3], slots=5)
    table = rows(found)
    for expert in (0, 1):
        assert sum(expert in experts for experts in table.values()) >= 2


def test_nodes_are_numbered_by_first_ranks() -> None:
    assert numbered_nodes({0: "b", 1: "a", 3: "b"}, 4) == (2, (0, 1, 0, 0))
    assert numbered_nodes({}, 2) == (1, (0, 0))


def test_last_ranks_are_cut_off() -> None:
    placement = Placement(3, 2, 2, np.array([[0, 1, -1]], np.int32), nodes=(0, 1, 0))
    cut = without_last_ranks(placement, 2)
    assert (cut.num_ranks, cut.nodes, cut.physical_to_logical_map.tolist()) == (2, (0, 1), [[0, 1]])
