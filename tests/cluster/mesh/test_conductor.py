"""The conductor step by step: what is published, ordered and released, and in which order."""

from __future__ import annotations

from cluster.mesh.way import Pace
from placement.placement import Placement
from tests.support.simulated.conducted import Conducted, exchanging, overwriting, sources

# --- the order of things ------------------------------------------------------------------------------------------


def test_without_a_target_nothing_moves() -> None:
    mesh = Conducted(2, {0: [[0]], 1: [[1]]}, {0: 2, 1: 2})
    mesh.step(100.0)
    assert (mesh.conductor.phase, mesh.conductor.copies_left, mesh.conductor.row_of(0)) == ("idle", 0, None)
    assert mesh.order(0) is None


def test_a_target_that_is_reached_takes_nothing() -> None:
    mesh = Conducted(2, {0: [[0]], 1: [[1]]}, {0: 2, 1: 2})
    before = mesh.epoch
    mesh.aim({0: [[0]], 1: [[1]]})
    assert mesh.conductor.moving, "it has to look first"
    mesh.step()
    assert not mesh.conductor.moving
    assert mesh.epoch == before


def test_what_is_overwritten_leaves_the_map_and_the_shard_copies_once_routers_have_moved_on() -> None:
    mesh = overwriting()
    before = mesh.epoch
    mesh.step()
    assert (mesh.conductor.phase, mesh.epoch) == ("retiring", before + 1)
    assert mesh.published == {0: [[0]], 1: [[1, 2]]}
    assert mesh.order(0) is None
    mesh.step(1000.0)
    assert mesh.order(0) is None, "a router still sends expert 1 to rank 0, however long"
    mesh.move_routers()
    assert mesh.conductor.phase == "copying"
    order = mesh.order(0)
    assert order is not None
    assert (order.release, sources(order.copy)) == (((0, 1),), {(0, 2): [1]})
    assert (mesh.conductor.copies_in_flight, mesh.conductor.copies_left) == (1, 1)
    assert mesh.published == {0: [[0]], 1: [[1, 2]]}, "it is not there yet"
    assert mesh.carry_out(0)
    assert (mesh.conductor.phase, mesh.epoch) == ("idle", before + 2)
    assert mesh.published == {0: [[0, 2]], 1: [[1, 2]]}
    assert not mesh.conductor.moving
    counters = mesh.conductor.counters
    assert (counters.rounds, counters.copies, counters.copied_bytes, counters.failed_copies) == (1, 1, 10, 0)


def test_what_is_dropped_leaves_the_map_with_the_copies_and_is_released_once_routers_have_moved_on() -> None:
    mesh = exchanging()
    before = mesh.epoch
    mesh.step()
    assert (mesh.conductor.phase, mesh.epoch) == ("copying", before), "spare slots suffice"
    for rank, expert in ((0, 2), (1, 1)):
        order = mesh.order(rank)
        assert order is not None
        assert (order.release, list(sources(order.copy))) == ((), [(0, expert)])
    assert mesh.carry_out(0)
    assert mesh.published == {0: [[0, 1]], 1: [[2, 3]]}, "a round is published whole"
    assert mesh.carry_out(1)
    assert (mesh.epoch, mesh.published) == (before + 1, {0: [[0, 2]], 1: [[1, 3]]})
    assert mesh.order(0) is None
    mesh.move_routers()
    orders = [mesh.order(rank) for rank in (0, 1)]
    assert [order and (order.release, order.copy) for order in orders] == [(((0, 1),), ()), (((0, 2),), ())]
    mesh.finish()
    assert [row.sum() for row in mesh.held.values()] == [2, 2]


def test_without_routers_nobody_is_waited_for() -> None:
    mesh = overwriting()
    mesh.routers_epoch = float("inf")  # type: ignore[assignment]
    mesh.step()
    assert mesh.conductor.phase == "copying"
    assert mesh.order(0) is not None


def test_rounds_are_as_large_as_the_pace_and_follow_one_another() -> None:
    mesh = Conducted(4, {0: [[0, 1, 2, 3]], 1: [[]]}, {0: 4, 1: 4})
    mesh.conductor.pace = Pace(max_bytes_per_s=20.0, round_s=1.0)
    mesh.aim({0: [[0, 1]], 1: [[2, 3]]})
    seen = []
    while mesh.conductor.moving:
        mesh.move_routers()
        if (order := mesh.order(1)) is not None:
            seen.append(len(order.copy))
            assert order.max_bytes_per_s == 20.0
        assert sum(mesh.carry_out(rank) for rank in (0, 1)) or not mesh.conductor.moving
    assert seen == [2], "two experts of ten bytes a second"
    mesh.finish()
    mesh.conductor.pace = Pace(max_bytes_per_s=10.0, round_s=1.0)
    mesh.aim({0: [[0, 1, 2, 3]], 1: [[]]})
    mesh.step()
    assert mesh.conductor.copies_left == 2
    assert mesh.conductor.copies_in_flight == 1
    assert len(mesh.conductor.rounds_to(mesh.placement({0: [[0, 1, 2, 3]], 1: [[]]}))) >= 2
    mesh.finish()
    assert mesh.published == {0: [[0, 1, 2, 3]], 1: [[]]}


def test_copies_come_from_holders_in_the_map_the_near_ones_first() -> None:
    """Ranks 0 and 2 are on one node, 1 and 3 on the other."""
    mesh = Conducted(2, {0: [[0, 1]], 1: [[0, 1]], 2: [[0]], 3: [[1]]}, dict.fromkeys(range(4), 2))
    mesh.aim({rank: [[0, 1]] for rank in range(4)})
    mesh.step()
    to_2, to_3 = mesh.order(2), mesh.order(3)
    assert to_2 is not None
    assert to_3 is not None
    assert sources(to_2.copy)[0, 1][0] == 0
    assert sources(to_3.copy)[0, 0][0] == 1
    for order, rank in ((to_2, 2), (to_3, 3)):
        for ranks in sources(order.copy).values():
            assert len(ranks) <= 3
            assert rank not in ranks


def test_what_nobody_holds_comes_from_the_checkpoint() -> None:
    mesh = Conducted(2, {0: [[0]]}, {0: 2})
    mesh.aim({0: [[0, 1]]})
    mesh.step()
    order = mesh.order(0)
    assert order is not None
    assert sources(order.copy) == {(0, 1): []}


# --- told otherwise -----------------------------------------------------------------------------------------------


def test_a_pause_lets_the_round_end_and_no_other_begin() -> None:
    mesh = Conducted(4, {0: [[0, 1, 2, 3]], 1: [[]]}, {0: 4, 1: 4})
    mesh.conductor.pace = Pace(max_bytes_per_s=10.0, round_s=1.0)
    mesh.aim({0: [[0, 1]], 1: [[2, 3]]})
    mesh.step()
    mesh.conductor.pause(True)
    assert mesh.carry_out(1)
    assert mesh.held[1].sum() == 1
    for _ in range(3):
        mesh.move_routers()
        mesh.step(100.0)
        assert not mesh.carry_out(1)
    assert (mesh.conductor.phase, mesh.conductor.paused, mesh.conductor.moving) == ("idle", True, True)
    mesh.conductor.pause(False)
    mesh.finish()
    assert mesh.published == {0: [[0, 1]], 1: [[2, 3]]}


def test_another_target_comes_after_the_round_at_hand() -> None:
    mesh = overwriting()
    mesh.step()
    mesh.aim({0: [[0, 1]], 1: [[1, 2]]})
    mesh.step()
    assert mesh.conductor.phase == "retiring"
    mesh.finish()
    assert mesh.published == {0: [[0, 1]], 1: [[1, 2]]}


def test_the_rows_of_a_target() -> None:
    mesh = exchanging()
    assert mesh.conductor.row_of(0).tolist() == [[True, False, True, False]]  # type: ignore[union-attr]
    assert mesh.conductor.row_of(2) is None
    rounds = mesh.conductor.rounds_to(Placement.linear(1, 4, 2))
    assert rounds == [], "it is there already, whatever the target is"
