"""How far a target can be reached with the ranks that are there, and how fast."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.mesh.holdings import Holdings, experts_by_rank, placement_of
from cluster.mesh.way import ASSUMED_BYTES_PER_S, Pace, reachable, rounds_to
from placement.migration.layer import MigrationError
from placement.placement import Placement

Rows = dict[int, list[int]]


def row(experts: list[int], num_experts: int) -> np.ndarray:
    row_LE = np.zeros((1, num_experts), np.bool_)
    row_LE[0, experts] = True
    return row_LE


def holdings(rows: Rows, slots: int, num_experts: int = 4) -> Holdings:
    found = Holdings(1, num_experts)
    for rank, experts in rows.items():
        found.add(rank, slots, "n", row(experts, num_experts))
    return found


def target(rows: Rows, num_experts: int = 4) -> Placement:
    width = max(map(len, rows.values()))
    table = {rank: row(experts, num_experts) for rank, experts in rows.items()}
    return placement_of(table, (1, num_experts), max(rows) + 1, width)


def reached(wanted: Rows, held: Rows, slots: int) -> Rows:
    found = reachable(target(wanted), holdings(held, slots), max([*wanted, *held]) + 1)
    rows = {rank: np.flatnonzero(row_LE[0]).tolist() for rank, row_LE in experts_by_rank(found).items()}
    return {rank: experts for rank, experts in rows.items() if experts}


@pytest.mark.parametrize(
    ("wanted", "held", "slots", "expected"),
    [
        ({0: [0, 2], 1: [1, 3]}, {0: [0, 1], 1: [2, 3]}, 3, {0: [0, 2], 1: [1, 3]}),
        ({0: [0, 2], 1: [1], 2: [3]}, {0: [0, 1], 1: [2, 3]}, 3, {0: [0, 1, 2], 1: [1, 2, 3]}),
        ({0: [0, 2], 1: [1], 2: [3]}, {0: [0, 1], 1: [2, 3]}, 2, {0: [0, 1], 1: [2, 3]}),
        ({0: [0, 1, 2, 3]}, {0: [0, 1], 1: [2, 3]}, 4, {0: [0, 1, 2, 3]}),
        ({0: [0, 1], 1: [2, 3]}, {0: [0, 1]}, 4, {0: [0, 1]}),
    ],
    ids=["all there", "one awaited", "one awaited, no room", "one too many", "what is lost waits for its rank"],
)
def test_while_a_rank_is_awaited_the_others_only_gain(wanted: Rows, held: Rows, slots: int, expected: Rows) -> None:
    assert reached(wanted, held, slots) == expected


def test_a_rank_that_is_awaited_without_experts_is_not_waited_for() -> None:
    assert reached({0: [0, 1, 2, 3], 2: []}, {0: [0, 1], 1: [2, 3]}, 4) == {0: [0, 1, 2, 3]}


@pytest.mark.parametrize(
    ("limit", "round_s", "bytes_per_s", "rank_bytes"),
    [(50.0, 2.0, 50.0, 100), (50.0, 0.001, 50.0, 7), (None, 1.0, ASSUMED_BYTES_PER_S, int(ASSUMED_BYTES_PER_S))],
)
def test_a_round_has_room_for_one_expert_at_least(
    limit: float | None, round_s: float, bytes_per_s: float, rank_bytes: int
) -> None:
    pace = Pace(limit, round_s)
    assert (pace.bytes_per_s, pace.rank_bytes(7)) == (bytes_per_s, rank_bytes)


def test_rounds_are_cut_to_the_pace() -> None:
    held = holdings({0: [0, 1, 2, 3], 1: []}, 4)
    wanted = target({0: [0], 1: [1, 2, 3]})
    for per_round, count in ((1, 3), (2, 2), (3, 1)):
        rounds = rounds_to(wanted, held, 10, Pace(10.0 * per_round, 1.0), None)
        assert [len(each.copies) for each in rounds if each.copies] == [per_round] * (3 // per_round) + (
            [3 % per_round] if 3 % per_round else []
        )
        assert sum(bool(each.copies) for each in rounds) == count


def test_the_most_used_of_what_nobody_has_comes_first() -> None:
    held = holdings({0: [0, 1]}, 4)
    load_LE = np.array([[1.0, 1.0, 2.0, 9.0]])
    rounds = rounds_to(target({0: [0, 1, 2, 3]}), held, 10, Pace(10.0, 1.0), load_LE)
    assert [[copy.expert for copy in each.copies] for each in rounds if each.copies] == [[3], [2]]


def test_full_shards_without_a_replica_to_spare_have_no_way() -> None:
    with pytest.raises(MigrationError, match="spare slot"):
        rounds_to(target({0: [0, 2], 1: [1, 3]}), holdings({0: [0, 1], 1: [2, 3]}, 2), 10, Pace(None, 1.0), None)
