"""The roster against its own invariants: seats, epochs, restarts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.controller.roster import Roster
from experts.protocol.membership import ShardEndpoint


def endpoint(rank: int, incarnation: str = "a") -> ShardEndpoint:
    return ShardEndpoint(rank, incarnation, "127.0.0.1", 1000 + rank, "host", 1)


def full_roster(num_ranks: int = 3) -> Roster:
    roster = Roster(num_ranks)
    for rank in range(num_ranks):
        assert roster.join(f"s{rank}", "n", rank, 0.0, 2.0).rank == rank
        assert roster.ready(f"s{rank}", endpoint(rank), 0.0)
    return roster


def test_wanted_ranks_are_granted_and_completeness_follows_ready() -> None:
    roster = Roster(2)
    assert roster.join("a", "n", 1, 0.0, 2.0).rank == 1
    assert roster.join("b", "n", 1, 0.0, 2.0).rank == 0, "a taken rank gives way to a free one"
    assert not roster.complete
    assert roster.missing == [0, 1]
    assert roster.ready("a", endpoint(1), 0.0)
    assert roster.epoch == 1
    assert roster.missing == [0]
    assert roster.ready("b", endpoint(0), 0.0)
    assert roster.complete
    assert roster.epoch == 2


def test_joining_again_gives_the_same_rank() -> None:
    roster = Roster(2)
    assert roster.join("a", "n", 0, 0.0, 2.0) == roster.join("a", "n", 1, 0.5, 2.0)


def test_a_successor_takes_the_rank_of_a_silent_shard_and_not_of_a_living_one() -> None:
    roster = full_roster()
    epoch = roster.epoch
    answer = roster.join("new", "n", 1, 1.0, 2.0)
    assert answer.rank is None
    assert "3 ranks are taken" in answer.reason
    roster.heartbeat("s0", 2.5)
    roster.heartbeat("s2", 2.5)
    assert roster.join("new", "n", 1, 2.5, 2.0).rank == 1
    assert roster.epoch == epoch + 1, "routers hear that the rank is empty"
    assert roster.ready("new", endpoint(1, "b"), 3.0)
    assert roster.epoch == epoch + 2
    assert not roster.heartbeat("s1", 3.0), "the old holder learns that it lost its seat"


def test_a_late_shard_keeps_its_seat_from_all_but_its_own_successor() -> None:
    roster = full_roster()
    for shard in ("s0", "s2"):
        roster.heartbeat(shard, 2.5)
    assert roster.join("new", "n", 0, 2.5, 2.0).rank is None, "Serve did not give it the rank of the late one"
    assert roster.heartbeat("s1", 3.0)
    roster.heartbeat("s0", 7.0)
    roster.heartbeat("s2", 7.0)
    assert roster.expire(8.0, 5.0) == [1]
    assert roster.join("new", "n", 0, 8.0, 2.0).rank == 1


def test_a_successor_takes_its_predecessors_seat_where_ranks_are_not_serves() -> None:
    """Nodes a and b hold blocks of two ranks; Serve counted b1 before a2, so that 1 and 2 are swapped here."""
    roster = Roster(4, 2)
    for name, wanted in (("a1", 0), ("b1", 1), ("a2", 2), ("b2", 3)):
        roster.join(name, name[0], wanted, 0.0, 2.0)
    assert [seat.shard_id for seat in roster.seats] == ["a1", "a2", "b1", "b2"]
    assert roster.join("b3", "b", 1, 2.5, 2.0).rank == 2, "not 1, where a2 is as late, but may live"
    assert roster.heartbeat("a2", 2.6)


def test_a_successor_on_another_node_waits_for_a_rank_that_suits() -> None:
    roster = Roster(4, 2)
    for name, wanted in (("a1", 0), ("a2", 1), ("b1", 2), ("b2", 3)):
        roster.join(name, name[0], wanted, 0.0, 2.0)
    roster.leave("b2")
    assert roster.join("b3", "b", 1, 2.5, 2.0).rank == 3, "a2 is its predecessor, but of another node"


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
    roster.given_up(1, "a", 1.0)
    roster.credit_pause(30.0, 31.5)
    assert roster.retry(45.0, 5.0) == []
    roster.heartbeat("s1", 46.0)
    assert roster.retry(46.0, 5.0) == [1]


def test_silence_empties_a_rank_once() -> None:
    roster = full_roster()
    roster.heartbeat("s0", 5.0)
    epoch = roster.epoch
    assert roster.expire(5.0, 5.0) == [1, 2]
    assert roster.missing == [1, 2]
    assert roster.expire(5.1, 5.0) == []
    assert roster.epoch == epoch + 2


def test_leaving_while_loading_changes_no_epoch() -> None:
    roster = Roster(2)
    roster.join("a", "n", 0, 0.0, 2.0)
    roster.leave("a")
    roster.leave("a")
    assert roster.epoch == 0


def test_a_shard_that_lost_its_seat_while_loading_is_turned_away() -> None:
    roster = Roster(1)
    roster.join("slow", "n", 0, 0.0, 2.0)
    assert roster.join("quick", "n", 0, 10.0, 2.0).rank == 0
    assert not roster.ready("slow", endpoint(0), 11.0)


def test_restart_rebuilds_ranks_and_goes_above_every_epoch_seen() -> None:
    before = full_roster()
    after = Roster(3)
    for rank in (2, 0):
        assert after.rejoin(f"s{rank}", "n", endpoint(rank), before.epoch, 0.0)
    assert after.endpoints == (endpoint(0), None, endpoint(2))
    assert after.epoch > before.epoch
    assert after.join("new", "n", 2, 0.0, 2.0).rank == 1, "only the rank that nobody claimed is free"
    assert not after.rejoin("s1", "n", endpoint(1), before.epoch, 0.0), "too late: the rank is taken"


def test_a_shard_that_loads_gets_its_rank_again_or_none() -> None:
    """The controller restarted: rank 2 here is Serve's 1, and its block seems to be free for any node."""
    roster = Roster(4, 2)
    assert [roster.join(name, "a", wanted, 0.0, 2.0).rank for name, wanted in (("a1", 0), ("a2", 2))] == [0, 1]
    assert roster.join("b1", "b", 1, 0.0, 2.0, loading=2).rank == 2
    assert roster.join("x", "a", 0, 9.0, 2.0, loading=2).rank is None
    assert roster.join("x", "a", 0, 9.0, 2.0, loading=4).rank is None
    assert roster.ready("b1", endpoint(2), 9.0)
    assert roster.join("b2", "b", 1, 11.5, 2.0).rank == 3
    assert roster.join("b3", "b", 1, 11.5, 2.0).rank == 2, "Serve's rank is remembered, not the one that was loaded"


def test_a_shard_that_rejoins_has_one_seat_and_its_successor_is_known() -> None:
    roster = Roster(2)
    assert roster.join("a", "n", 0, 0.0, 2.0).rank == 0
    assert not roster.rejoin("a", "n", endpoint(1), 3, 0.0, 0)
    assert [(seat.shard_id, seat.rank) for seat in roster.seats] == [("a", 0)]
    assert roster.rejoin("b", "n", endpoint(1), 3, 0.0, 1)
    assert roster.join("c", "n", 1, 2.0, 2.0).rank == 1


def test_a_router_may_have_seen_a_later_epoch_than_the_shards() -> None:
    roster = Roster(1)
    roster.rejoin("s0", "n", endpoint(0), 3, 0.0)
    roster.raise_epoch_above(9)
    assert roster.epoch == 10
    roster.raise_epoch_above(4)
    assert roster.epoch == 10


def test_given_up_shards_are_tried_again_only_when_they_live() -> None:
    roster = full_roster()
    roster.given_up(1, "another incarnation", 1.0)
    roster.given_up(1, "a", 1.0)
    roster.given_up(2, "a", 1.0)
    roster.given_up(1, "a", 3.0)
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
        roster.given_up(1, incarnation, now_s)
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
    assert roster.ready("s1", endpoint(1, "b"), 400.0)
    assert retry_pauses(roster, 400.0, 2, "b") == [5, 10], "another incarnation is another chance"
    assert retry_pauses(roster, 500.0, 1, "b") == [5], "so is a long time that went well"


def test_nodes_fill_blocks_of_ranks() -> None:
    roster = Roster(4, 2)
    ranks = {
        name: roster.join(name, name[0], wanted, 0.0, 2.0).rank
        for name, wanted in (("a1", 0), ("b1", 1), ("a2", 2), ("b2", 3))
    }
    assert ranks == {"a1": 0, "a2": 1, "b1": 2, "b2": 3}


def test_more_shards_on_a_node_than_its_block_holds_still_find_ranks() -> None:
    roster = Roster(4, 2)
    ranks = [roster.join(f"a{i}", "a", i, 0.0, 2.0).rank for i in range(3)]
    ranks.append(roster.join("b", "b", 0, 0.0, 2.0).rank)
    assert sorted(r for r in ranks if r is not None) == [0, 1, 2, 3]


@pytest.mark.parametrize(("num_ranks", "num_nodes"), [(0, 1), (3, 2), (4, 0)])
def test_shapes_that_cannot_be(num_ranks: int, num_nodes: int) -> None:
    with pytest.raises(ValueError, match=f"{num_ranks} ranks"):
        Roster(num_ranks, num_nodes)


@given(st.integers(1, 6), st.integers(1, 3), st.data())
@settings(max_examples=60, deadline=None)
def test_everyone_who_can_be_seated_is(per_node: int, num_nodes: int, data: st.DataObject) -> None:
    """As many shards as ranks, in any order, on any nodes, wanting anything: all seated, ranks are a permutation."""
    num_ranks = per_node * num_nodes
    roster = Roster(num_ranks, num_nodes)
    ranks = []
    for index in range(num_ranks):
        node = data.draw(st.sampled_from("abc"[:num_nodes]))
        ranks.append(roster.join(f"s{index}", node, data.draw(st.integers(-1, num_ranks)), 0.0, 2.0).rank)
    assert sorted(r for r in ranks if r is not None) == list(range(num_ranks))


class RosterMachine(RuleBasedStateMachine):
    """Shards that join, load, send heartbeats, fall silent and come back, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.roster = Roster(3)
        self.now_s = 0.0
        self.epochs = {0: self.roster.endpoints}

    @rule(shard=st.integers(0, 4), wanted=st.integers(0, 3))
    def join(self, shard: int, wanted: int) -> None:
        self.roster.join(f"s{shard}", "n", wanted, self.now_s, 2.0)

    @rule(shard=st.integers(0, 4), incarnation=st.sampled_from("abc"))
    def ready(self, shard: int, incarnation: str) -> None:
        seat = self.roster.seat_of(f"s{shard}")
        if seat is not None:
            assert self.roster.ready(f"s{shard}", endpoint(seat.rank, incarnation), self.now_s)

    @rule(shard=st.integers(0, 4), rank=st.integers(0, 3), epoch=st.integers(0, 30))
    def rejoin(self, shard: int, rank: int, epoch: int) -> None:
        seated = self.roster.rejoin(f"s{shard}", "n", endpoint(rank), epoch, self.now_s)
        assert not seated or self.roster.epoch > epoch

    @rule(shard=st.integers(0, 4))
    def heartbeat(self, shard: int) -> None:
        assert self.roster.heartbeat(f"s{shard}", self.now_s) == (self.roster.seat_of(f"s{shard}") is not None)

    @rule(shard=st.integers(0, 4))
    def leave(self, shard: int) -> None:
        self.roster.leave(f"s{shard}")
        assert self.roster.seat_of(f"s{shard}") is None

    @rule(rank=st.integers(0, 3), incarnation=st.sampled_from("abc"))
    def given_up(self, rank: int, incarnation: str) -> None:
        self.roster.given_up(rank, incarnation, self.now_s)

    @rule(pause_s=st.floats(0.1, 4.0))
    def time_passes(self, pause_s: float) -> None:
        self.now_s += pause_s
        self.roster.expire(self.now_s, 5.0)
        self.roster.retry(self.now_s, 1.0)

    @invariant()
    def seats_are_consistent(self) -> None:
        ids = [seat.shard_id for seat in self.roster.seats]
        assert len(ids) == len(set(ids)), "one shard, one seat"
        for rank, found in enumerate(self.roster.endpoints):
            assert found is None or found.rank == rank

    @invariant()
    def an_epoch_means_one_membership_and_never_falls(self) -> None:
        epoch, endpoints = self.roster.epoch, self.roster.endpoints
        assert epoch >= max(self.epochs)
        assert self.epochs.setdefault(epoch, endpoints) == endpoints


TestRosterMachine = RosterMachine.TestCase
TestRosterMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
