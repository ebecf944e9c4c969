"""The roster against its own invariants: seats, ranks, epochs, silence."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.mesh.roster import Roster
from tests.support.rosters import endpoint, full_roster


def test_ranks_are_given_out_from_zero_and_a_free_one_is_given_again() -> None:
    roster = Roster()
    assert roster.lowest_free_rank() == 0
    for expected in (0, 1, 2):
        rank = roster.lowest_free_rank()
        assert rank == expected
        roster.sit(f"s{rank}", "n", rank, rank, 0.0)
    roster.leave("s1")
    assert roster.lowest_free_rank() == 1
    assert roster.lowest_free_rank({1}) == 3
    assert roster.lowest_free_rank({1, 3}) == 4


def test_endpoints_are_as_many_as_asked_for() -> None:
    roster = full_roster(2)
    assert roster.endpoints(0) == ()
    assert roster.endpoints(1) == (endpoint(0),)
    assert roster.endpoints(4) == (endpoint(0), endpoint(1), None, None)
    roster.sit("new", "n", 2, 2, 0.0)
    assert roster.endpoints(3)[2] is None, "it does not listen yet"


def test_a_published_placement_is_an_epoch() -> None:
    roster = full_roster(1)
    before = roster.epoch
    assert roster.publish() == before + 1 == roster.epoch


def test_sitting_down_in_the_seat_of_a_dead_shard_takes_it_out() -> None:
    roster = full_roster()
    epoch = roster.epoch
    seat = roster.sit("new", "m", 1, 7, 4.0)
    assert (seat.shard_id, seat.node_id, seat.rank, seat.serve_rank, seat.last_heartbeat_s) == ("new", "m", 1, 7, 4.0)
    assert roster.at(1) is seat is roster.seat_of("new")
    assert roster.epoch == epoch + 1, "routers hear that the rank is empty"
    assert roster.ready("new", endpoint(1, "b"), 5, 5.0)
    assert roster.epoch == epoch + 2
    assert not roster.heartbeat("s1", 5.0), "the old holder learns that it lost its seat"
    assert not roster.ready("s1", endpoint(1), 5, 5.0)


def test_sitting_down_in_the_seat_of_one_that_only_started_changes_nothing_for_routers() -> None:
    roster = Roster()
    roster.sit("old", "n", 0, 0, 0.0)
    roster.sit("new", "n", 0, 0, 2.0)
    assert roster.epoch == 0
    assert not roster.ready("old", endpoint(0), 5, 3.0)


def test_only_a_silent_shard_of_the_same_serve_rank_is_a_dead_predecessor() -> None:
    roster = full_roster()  # Serve's ranks 10, 11, 12
    roster.heartbeat("s2", 1.0)
    assert roster.left_by_predecessor(11, 1.99, 2.0) is None
    assert roster.left_by_predecessor(11, 2.0, 2.0) == 1
    assert roster.left_by_predecessor(12, 2.0, 2.0) is None, "heard a second ago"
    assert roster.left_by_predecessor(1, 9.0, 2.0) is None, "our ranks are not Serve's"


def test_what_nobody_could_hear_is_no_silence() -> None:
    roster = full_roster()
    roster.heartbeat("s0", 4.0)
    roster.heartbeat("s2", 60.9)
    roster.credit_pause(56.0, 61.0)
    assert roster.expire(61.0, 5.0) == [1], "silent for as long before"
    assert roster.expire(65.9, 5.0) == [0]
    assert roster.expire(65.95, 5.0) == [], "not forgiven into the future"
    assert roster.expire(66.0, 5.0) == [2]


def test_forgiving_a_shard_that_was_given_up_is_no_sign_of_life() -> None:
    roster = full_roster()
    roster.given_up(1, "a1", 1.0)
    roster.credit_pause(30.0, 31.5)
    assert roster.retry(45.0, 5.0) == []
    roster.heartbeat("s1", 46.0)
    assert roster.retry(46.0, 5.0) == [1]


def test_silence_empties_a_rank_once() -> None:
    roster = full_roster()
    roster.heartbeat("s0", 5.0)
    epoch = roster.epoch
    assert roster.expire(5.0, 5.0) == [1, 2]
    assert [seat.rank for seat in roster.seats] == [0]
    assert roster.expire(5.1, 5.0) == []
    assert roster.epoch == epoch + 2


def test_leaving_tells_which_rank_is_free() -> None:
    roster = full_roster()
    epoch = roster.epoch
    assert roster.leave("s1") == 1
    assert roster.leave("s1") is None
    assert roster.epoch == epoch + 1
    roster.sit("new", "n", 1, 1, 0.0)
    assert roster.leave("new") == 1
    assert roster.epoch == epoch + 1, "leaving while it starts changes no epoch"


def test_a_router_may_have_seen_a_later_epoch_than_the_shards() -> None:
    roster = full_roster(1)
    roster.raise_epoch_above(9)
    assert roster.epoch == 10
    roster.raise_epoch_above(4)
    assert roster.epoch == 10


def test_given_up_shards_are_tried_again_only_when_they_live() -> None:
    roster = full_roster()
    roster.given_up(1, "another incarnation", 1.0)
    roster.given_up(1, "a1", 1.0)
    roster.given_up(2, "a2", 1.0)
    roster.given_up(1, "a1", 3.0)
    roster.heartbeat("s1", 4.0)
    epoch = roster.epoch
    assert roster.retry(5.9, 5.0) == [], "not yet"
    assert roster.retry(6.0, 5.0) == [1], "rank 2 gave no sign of life since"
    assert roster.epoch == epoch + 1
    assert roster.retry(20.0, 5.0) == []


def retry_pauses(roster: Roster, now_s: float, count: int, incarnation: str = "a") -> list[int]:
    """Whole seconds that rank 1 waits for each retry when it is given up again immediately."""
    pauses = []
    for _ in range(count):
        roster.given_up(1, f"{incarnation}1", now_s)
        pause_s = 0
        while pause_s < 1000:
            pause_s += 1
            roster.heartbeat("s1", now_s + pause_s)
            if roster.retry(now_s + pause_s, 5.0):
                break
        pauses.append(pause_s)
        now_s += pause_s
    return pauses


def test_a_shard_that_is_given_up_again_and_again_is_tried_ever_less_often() -> None:
    roster = full_roster()
    assert retry_pauses(roster, 1.0, 7) == [5, 10, 20, 40, 80, 80, 80]
    assert roster.ready("s1", endpoint(1, "b"), 5, 400.0)
    assert retry_pauses(roster, 400.0, 2, "b") == [5, 10], "another incarnation is another chance"
    assert retry_pauses(roster, 500.0, 1, "b") == [5], "so is a long time that went well"


@pytest.mark.parametrize("count", [1, 2, 7])
@given(data=st.data())
@settings(max_examples=20)
def test_ranks_stay_below_the_most_shards_that_were_there_at_once(count: int, data: st.DataObject) -> None:
    roster = Roster()
    for index in range(20):
        if len(roster.seats) == count:
            roster.leave(data.draw(st.sampled_from([seat.shard_id for seat in roster.seats])))
        rank = roster.lowest_free_rank()
        assert roster.at(rank) is None
        assert rank < count
        roster.sit(f"s{index}", "n", rank, index, 0.0)


class RosterMachine(RuleBasedStateMachine):
    """Shards that sit down, load, send heartbeats, fall silent and come back, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.roster = Roster()
        self.now_s = 0.0
        self.epochs = {0: self.roster.endpoints(5)}

    @rule(shard=st.integers(0, 4), rank=st.none() | st.integers(0, 4), serve_rank=st.integers(0, 3))
    def sit(self, shard: int, rank: int | None, serve_rank: int) -> None:
        if self.roster.seat_of(f"s{shard}") is None:
            rank = self.roster.lowest_free_rank() if rank is None else rank
            self.roster.sit(f"s{shard}", "n", rank, serve_rank, self.now_s)

    @rule(shard=st.integers(0, 4), incarnation=st.sampled_from("abc"))
    def ready(self, shard: int, incarnation: str) -> None:
        seat = self.roster.seat_of(f"s{shard}")
        rank = 0 if seat is None else seat.rank
        assert self.roster.ready(f"s{shard}", endpoint(rank, incarnation), 3, self.now_s) == (seat is not None)

    @rule(epoch=st.integers(0, 30))
    def hear_of_epoch(self, epoch: int) -> None:
        self.roster.raise_epoch_above(epoch)
        assert self.roster.epoch > epoch

    @rule()
    def publish(self) -> None:
        before = self.roster.epoch
        assert self.roster.publish() == before + 1

    @rule(shard=st.integers(0, 4))
    def heartbeat(self, shard: int) -> None:
        assert self.roster.heartbeat(f"s{shard}", self.now_s) == (self.roster.seat_of(f"s{shard}") is not None)

    @rule(shard=st.integers(0, 4))
    def leave(self, shard: int) -> None:
        seat = self.roster.seat_of(f"s{shard}")
        assert self.roster.leave(f"s{shard}") == (None if seat is None else seat.rank)
        assert self.roster.seat_of(f"s{shard}") is None

    @rule(rank=st.integers(0, 4), incarnation=st.sampled_from("abc"))
    def given_up(self, rank: int, incarnation: str) -> None:
        self.roster.given_up(rank, f"{incarnation}{rank}", self.now_s)

    @rule(pause_s=st.floats(0.1, 4.0))
    def time_passes(self, pause_s: float) -> None:
        self.now_s += pause_s
        silent = [seat.rank for seat in self.roster.seats if self.now_s - seat.last_heartbeat_s >= 5.0]
        assert self.roster.expire(self.now_s, 5.0) == silent
        self.roster.retry(self.now_s, 1.0)

    @invariant()
    def seats_are_consistent(self) -> None:
        seats = self.roster.seats
        assert len({seat.shard_id for seat in seats}) == len({seat.rank for seat in seats}) == len(seats)
        for rank, found in enumerate(self.roster.endpoints(5)):
            assert found is None or found.rank == rank

    @invariant()
    def an_epoch_means_one_set_of_endpoints_and_never_falls(self) -> None:
        epoch, endpoints = self.roster.epoch, self.roster.endpoints(5)
        assert epoch >= max(self.epochs)
        assert self.epochs.setdefault(epoch, endpoints) == endpoints


TestRosterMachine = RosterMachine.TestCase
TestRosterMachine.settings = settings(max_examples=60, stateful_step_count=30)
