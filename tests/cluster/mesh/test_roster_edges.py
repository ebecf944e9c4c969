"""The roster at its edges: the instant that suffices and the one before, what raises the epoch and what does not."""

from __future__ import annotations

import math

import pytest

from cluster.mesh.roster import Roster, Seat
from tests.support.rosters import endpoint, full_roster


def seat(roster: Roster, rank: int) -> Seat:
    found = roster.at(rank)
    assert found is not None
    return found


def test_an_empty_roster() -> None:
    roster = Roster()
    assert (roster.epoch, roster.seats, roster.endpoints(2), roster.at(0)) == (0, [], (None, None), None)
    assert (roster.expire(99.0, 1.0), roster.retry(99.0, 1.0), roster.leave("s")) == ([], [], None)
    assert roster.left_by_predecessor(0, 99.0, 1.0) is None
    assert roster.epoch == 0


def test_a_seat_that_is_new_was_never_given_up_nor_tried_again() -> None:
    new = Seat("s", "n", 1, 5.0)
    assert (new.endpoint, new.serve_rank, new.given_up_s, new.retries, new.serving) == (None, None, None, 0, False)
    assert (new.retried_s, new.num_slots, new.draining) == (-math.inf, 0, "")
    new.endpoint = endpoint(1)
    assert new.serving


def test_seats_come_by_rank_and_are_found_by_shard() -> None:
    roster = Roster()
    for name, rank in (("c", 2), ("a", 0), ("b", 1)):
        roster.sit(name, "n", rank, rank, 1.5)
    assert [(one.shard_id, one.node_id, one.rank, one.last_heartbeat_s, one.serve_rank) for one in roster.seats] == [
        ("a", "n", 0, 1.5, 0),
        ("b", "n", 1, 1.5, 1),
        ("c", "n", 2, 1.5, 2),
    ]
    assert roster.seat_of("b") is roster.seats[1]
    assert roster.seat_of("d") is None


# --- serving ------------------------------------------------------------------------------------------------------


def test_ready_is_for_the_seat_it_has_and_counts_once() -> None:
    roster = Roster()
    roster.sit("a", "n", 0, 0, 0.0)
    assert not roster.ready("a", endpoint(1), 5, 1.0)
    assert not roster.ready("b", endpoint(0), 5, 1.0)
    assert (roster.epoch, seat(roster, 0).last_heartbeat_s, seat(roster, 0).num_slots) == (0, 0.0, 0)
    assert roster.ready("a", endpoint(0), 5, 3.0)
    assert (roster.epoch, seat(roster, 0).last_heartbeat_s, roster.endpoints(1)) == (1, 3.0, (endpoint(0),))
    assert seat(roster, 0).num_slots == 5
    assert roster.ready("a", endpoint(0), 6, 4.0)
    assert (roster.epoch, seat(roster, 0).last_heartbeat_s) == (1, 4.0), "the same once more is no change"
    roster.given_up(0, "a0", 5.0)
    assert roster.ready("a", endpoint(0), 5, 6.0)
    assert seat(roster, 0).given_up_s == 5.0
    assert roster.ready("a", endpoint(0, "b"), 5, 7.0)
    assert (roster.epoch, seat(roster, 0).given_up_s, roster.endpoints(1)[0]) == (2, None, endpoint(0, "b"))


def test_signs_of_life() -> None:
    roster = full_roster()
    assert roster.heartbeat("s1", 4.0)
    assert not roster.heartbeat("s9", 4.0)
    assert [one.last_heartbeat_s for one in roster.seats] == [0.0, 4.0, 0.0]


def test_a_shard_that_only_starts_is_silent_too() -> None:
    roster = Roster()
    roster.sit("a", "n", 3, 0, 0.0)
    assert roster.left_by_predecessor(0, 2.0, 2.0) == 3
    assert roster.expire(5.0, 5.0) == [3]
    assert roster.epoch == 0


def test_silence_counts_from_the_last_sign_and_to_the_instant() -> None:
    roster = full_roster()
    roster.heartbeat("s1", 1.0)
    assert roster.expire(4.99, 5.0) == []
    assert roster.expire(5.0, 5.0) == [0, 2]
    assert roster.expire(5.99, 5.0) == []
    assert roster.expire(6.0, 5.0) == [1]
    assert roster.epoch == 6
    sat_in_reverse = Roster()
    for rank in (2, 0, 1):
        sat_in_reverse.sit(f"s{rank}", "n", rank, rank, 0.0)
    assert sat_in_reverse.expire(9.0, 5.0) == [0, 1, 2]
    assert sat_in_reverse.epoch == 0


def test_a_pause_is_credited_up_to_now() -> None:
    roster = full_roster()
    roster.heartbeat("s1", 9.0)
    roster.given_up(1, "a1", 9.5)
    roster.given_up(2, "a2", 1.0)
    roster.credit_pause(6.0, 10.0)
    assert [one.last_heartbeat_s for one in roster.seats] == [6.0, 10.0, 6.0]
    assert [one.given_up_s for one in roster.seats] == [None, 10.0, 7.0]


# --- trying again -------------------------------------------------------------------------------------------------


def test_only_the_incarnation_that_serves_is_given_up_and_only_the_first_time_counts() -> None:
    roster = Roster()
    roster.given_up(0, "a0", 1.0)
    roster.sit("s0", "n", 0, 0, 0.0)
    roster.given_up(0, "a0", 1.0)
    assert seat(roster, 0).given_up_s is None, "it loads, so nobody can have gone without it"
    roster.ready("s0", endpoint(0), 5, 2.0)
    roster.given_up(0, "b0", 3.0)
    assert seat(roster, 0).given_up_s is None
    roster.given_up(0, "a0", 4.0)
    roster.given_up(0, "a0", 5.0)
    assert seat(roster, 0).given_up_s == 4.0


def test_a_retry_is_due_to_the_instant_for_those_that_were_heard_since() -> None:
    roster = full_roster(now_s=1.0)
    for rank in (2, 1, 0):
        roster.given_up(rank, f"a{rank}", 1.0)
    roster.heartbeat("s1", 1.5)
    roster.heartbeat("s2", 1.5)
    assert roster.retry(5.9, 5.0) == []
    assert roster.epoch == 3, "an epoch without news would be one for nothing"
    assert roster.retry(6.0, 5.0) == [1, 2], "s0 was last heard at that instant, not after it"
    assert roster.epoch == 4, "one epoch for both"
    found = seat(roster, 1)
    assert (found.given_up_s, found.retried_s, found.retries) == (None, 6.0, 1)
    assert roster.retry(50.0, 5.0) == []


def test_the_pause_doubles_up_to_sixteen_times_the_first() -> None:
    roster = full_roster()
    now_s = 0.0
    for retries, pause_s in enumerate((5.0, 10.0, 20.0, 40.0, 80.0, 80.0)):
        roster.given_up(1, "a1", now_s)
        roster.heartbeat("s1", now_s + pause_s - 0.1)
        assert roster.retry(now_s + pause_s - 0.1, 5.0) == []
        assert roster.retry(now_s + pause_s, 5.0) == [1]
        now_s += pause_s
        assert (seat(roster, 1).retries, seat(roster, 1).retried_s) == (retries + 1, now_s)


@pytest.mark.parametrize(("well_s", "pause_s"), [(80.0, 20.0), (80.1, 5.0)])
def test_a_longer_time_that_went_well_makes_the_pause_short_again(well_s: float, pause_s: float) -> None:
    roster = full_roster()
    now_s = 0.0
    for pause in (5.0, 10.0):
        roster.given_up(1, "a1", now_s)
        now_s += pause
        roster.heartbeat("s1", now_s)
        assert roster.retry(now_s, 5.0) == [1]
    now_s += well_s
    roster.given_up(1, "a1", now_s)
    roster.heartbeat("s1", now_s + 1)
    assert roster.retry(now_s + pause_s - 0.1, 5.0) == []
    assert roster.retry(now_s + pause_s, 5.0) == [1]


def test_epochs_of_earlier_controllers_are_left_behind() -> None:
    roster = Roster()
    roster.raise_epoch_above(0)
    assert roster.epoch == 1
    roster.raise_epoch_above(0)
    assert roster.epoch == 1
    roster.raise_epoch_above(1)
    assert roster.epoch == 2
