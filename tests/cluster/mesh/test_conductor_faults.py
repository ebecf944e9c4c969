"""The conductor when something goes wrong: copies that fail or come late, lost results, lost ranks, no legal order."""

from __future__ import annotations

import logging

import pytest

from cluster.mesh.conductor import FIRST_PAUSE_S, GRACE_S, LONGEST_PAUSE_S, PATIENCE
from cluster.mesh.way import Pace
from tests.support.simulated.conducted import Conducted, exchanging, overwriting


def test_a_failed_copy_is_tried_again_after_a_pause_that_doubles() -> None:
    mesh = exchanging()
    mesh.step()
    pause_s = FIRST_PAUSE_S
    for attempt in range(1, 9):
        assert mesh.carry_out(0, failing={(0, 2)})
        if attempt == 1:
            assert mesh.carry_out(1)
            assert mesh.published == {0: [[0, 1]], 1: [[1, 2, 3]]}, "what came is used, nothing is dropped"
        assert mesh.conductor.counters.failed_copies == attempt
        assert "1 copies failed and 0 did not end in time" in mesh.conductor.problem
        assert mesh.conductor.moving
        mesh.move_routers()
        mesh.step(pause_s - 0.01)
        assert mesh.order(0) is None
        mesh.step(0.02)
        assert mesh.order(0) is not None
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
    assert mesh.carry_out(0)
    assert mesh.conductor.problem == ""
    mesh.finish()
    assert mesh.published == {0: [[0, 2]], 1: [[1, 3]]}
    mesh.aim({0: [[0, 1]], 1: [[2, 3]]})
    mesh.step()
    assert mesh.carry_out(0, failing={(0, 1)})
    assert mesh.carry_out(1)
    mesh.step(FIRST_PAUSE_S + 0.01)
    assert mesh.order(0) is not None, "a round that went well makes the pause short again"


def test_a_round_that_does_not_end_is_given_up_at_its_deadline() -> None:
    mesh = exchanging()
    mesh.conductor.pace = Pace(max_bytes_per_s=10.0, round_s=1.0)
    mesh.step()
    assert mesh.carry_out(1)
    mesh.step(PATIENCE * 1.0 + GRACE_S - 0.01)
    assert mesh.conductor.phase == "copying"
    mesh.step(0.02)
    assert "0 copies failed and 1 did not end in time" in mesh.conductor.problem
    assert mesh.published == {0: [[0, 1]], 1: [[1, 2, 3]]}
    mesh.finish()
    assert mesh.published == {0: [[0, 2]], 1: [[1, 3]]}


def test_a_copy_that_comes_after_its_round_was_given_up_takes_no_slot_for_good() -> None:
    """The target has changed meanwhile, and the shard holds an expert that nobody wants there."""
    mesh = exchanging()
    mesh.step()
    assert mesh.carry_out(1)
    mesh.step(PATIENCE + GRACE_S + 1)
    mesh.aim({0: [[0, 1]], 1: [[2, 3]]})
    mesh.move_routers()
    mesh.step(LONGEST_PAUSE_S)
    while mesh.carry_out(1):
        mesh.move_routers()
    mesh.finish()
    assert mesh.published == {0: [[0, 1]], 1: [[2, 3]]}
    assert [row.sum() for row in mesh.held.values()] == [2, 2]


def test_a_result_that_was_lost_is_seen_by_what_is_held() -> None:
    mesh = exchanging()
    mesh.step()
    assert mesh.carry_out(0, lose_results=True)
    assert mesh.carry_out(1, lose_results=True)
    assert mesh.published == {0: [[0, 2]], 1: [[1, 3]]}
    assert mesh.conductor.counters.copies == 0


def test_a_result_that_comes_twice_counts_for_the_round_once() -> None:
    mesh = exchanging()
    mesh.step()
    mesh.carry_out(0)
    mesh.conductor.report(0, mesh.held[0].copy(), [])
    assert mesh.conductor.copies_in_flight == 1
    mesh.carry_out(1)
    mesh.finish()
    assert mesh.published == {0: [[0, 2]], 1: [[1, 3]]}


def test_an_expert_that_a_shard_lacks_leaves_the_map_and_is_copied_again(caplog: pytest.LogCaptureFixture) -> None:
    mesh = Conducted(2, {0: [[0, 1]], 1: [[0, 1]]}, {0: 2, 1: 2})
    mesh.aim({0: [[0, 1]], 1: [[0, 1]]})
    mesh.step()
    before = mesh.epoch
    mesh.held[1][0, 1] = False
    with caplog.at_level(logging.WARNING):
        mesh.conductor.report(1, mesh.held[1].copy(), [])
    assert "rank 1 lacks experts" in caplog.text
    assert mesh.epoch == before + 1
    assert mesh.published == {0: [[0, 1]], 1: [[0]]}
    mesh.finish()
    assert mesh.published == {0: [[0, 1]], 1: [[0, 1]]}


def test_a_rank_that_is_lost_while_routers_move_on_gives_back_what_was_retired() -> None:
    mesh = overwriting()
    mesh.step()
    assert mesh.published[0] == [[0]]
    mesh.down(1)
    assert mesh.published == {0: [[0, 1]]}, "expert 1 is nowhere else any more"
    mesh.move_routers()
    mesh.aim({0: [[0, 1]], 1: [[2]]})
    mesh.move_routers()
    assert mesh.published == {0: [[0, 1]]}
    mesh.up(1)
    mesh.finish()
    assert mesh.published == {0: [[0, 1]], 1: [[2]]}


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_is_lost_while_copies_are_made_is_planned_around(lost: int) -> None:
    mesh = exchanging()
    mesh.step()
    mesh.down(lost)
    other = 1 - lost
    assert mesh.carry_out(other)
    mesh.finish()
    assert mesh.conductor.phase == "idle"
    assert set(mesh.published) == {other}
    mesh.up(lost)
    mesh.finish()
    assert mesh.published == {0: [[0, 2]], 1: [[1, 3]]}, "what died with it came from the checkpoint"


def test_while_a_rank_is_awaited_others_gain_experts_and_give_none_away() -> None:
    mesh = Conducted(4, {0: [[0, 1]], 1: [[2, 3]]}, {0: 3, 1: 3, 2: 2})
    mesh.aim({0: [[0, 3]], 1: [[2]], 2: [[1]]})
    mesh.finish()
    assert mesh.published == {0: [[0, 1, 3]], 1: [[2, 3]]}, "rank 2 is not there yet"
    mesh.up(2)
    mesh.finish()
    assert mesh.published == {0: [[0, 3]], 1: [[2]], 2: [[1]]}


def test_another_shard_at_a_rank_starts_with_new_orders() -> None:
    mesh = exchanging()
    mesh.step()
    stale = mesh.order(0)
    mesh.down(0)
    mesh.up(0, [[0]])
    order = mesh.order(0)
    assert order is None or order.version > stale.version  # type: ignore[union-attr]
    mesh.finish()
    assert mesh.published == {0: [[0, 2]], 1: [[1, 3]]}


def test_a_target_without_a_legal_order_is_a_problem_until_there_is_room(caplog: pytest.LogCaptureFixture) -> None:
    mesh = Conducted(4, {0: [[0, 1]], 1: [[2, 3]]}, {0: 2, 1: 2, 2: 1})
    mesh.aim({0: [[0, 2]], 1: [[1, 3]]})
    mesh.step()
    assert "spare slot" in mesh.conductor.problem
    assert mesh.published == {0: [[0, 1]], 1: [[2, 3]]}
    assert not mesh.conductor.moving, "it does not try again and again"
    caplog.clear()
    mesh.step(100.0)
    assert caplog.records == []
    mesh.up(2)
    mesh.finish()
    assert mesh.published == {0: [[0, 2]], 1: [[1, 3]], 2: [[]]}
    assert mesh.conductor.problem == ""


def test_what_a_shard_is_about_to_release_is_no_copy_that_arrived() -> None:
    """The target wants an expert back whose release is ordered and not done; a report comes before that."""
    mesh = Conducted(3, {0: [[0, 1]], 1: [[1, 2]]}, {0: 3, 1: 3})
    mesh.aim({0: [[0]], 1: [[1, 2]]})
    mesh.step()
    mesh.move_routers()
    release = mesh.order(0)
    assert release is not None
    assert release.release == ((0, 1),)
    mesh.aim({0: [[0, 1]], 1: [[1, 2]]})
    mesh.step()
    assert mesh.conductor.phase == "copying"
    mesh.conductor.report(0, mesh.held[0].copy(), [])
    mesh.step()
    assert mesh.published[0] == [[0]], "it goes first"
    mesh.finish()
    assert mesh.published == {0: [[0, 1]], 1: [[1, 2]]}
