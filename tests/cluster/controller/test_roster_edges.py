"""The roster at its edges: the instant that suffices and the one before, what raises the epoch and what does not."""

from __future__ import annotations

import math

import pytest

from cluster.controller.roster import Roster, Seat, placement_digest
from experts.protocol.membership import ShardEndpoint
from placement.placement import Placement


def endpoint(rank: int, incarnation: str = "a") -> ShardEndpoint:
    return ShardEndpoint(rank, incarnation, "127.0.0.1", 1000 + rank, "host", 1)


def full_roster(num_ranks: int = 3, now_s: float = 0.0) -> Roster:
    roster = Roster(num_ranks)
    for rank in range(num_ranks):
        assert roster.join(f"s{rank}", "n", rank, now_s, 2.0).rank == rank
        assert roster.ready(f"s{rank}", endpoint(rank), now_s)
    return roster


def seat(roster: Roster, rank: int) -> Seat:
    return next(found for found in roster.seats if found.rank == rank)


# --- digests and shapes -------------------------------------------------------------------------------------------


def test_the_digest_of_a_placement_is_sixteen_hex_digits_that_every_part_of_it_changes() -> None:
    found = {
        placement_digest(one)
        for one in (
            Placement.linear(2, 6, 3),
            Placement.linear(3, 6, 3),
            Placement.linear(2, 6, 2),
            Placement.linear(2, 6, 3, 3),
            Placement.linear(2, 6, 3, min_replicas=2),
            Placement(3, 1, 6, Placement.linear(2, 6, 3).physical_to_logical_map[:, ::-1].copy()),
        )
    }
    assert len(found) == 6
    assert all(len(digest) == 16 and int(digest, 16) >= 0 for digest in found)
    assert placement_digest(Placement.linear(2, 6, 3)) in found, "the same again for an equal placement"


def test_the_smallest_rosters_and_those_that_cannot_be() -> None:
    assert Roster(1).missing == [0]
    assert (Roster(4, 2).num_ranks, Roster(4, 2).num_nodes, Roster(4).num_nodes, Roster(4).epoch) == (4, 2, 1, 0)
    assert Roster(2, 2).endpoints == (None, None)
    for num_ranks, num_nodes in ((0, 1), (-2, 1), (2, 0), (2, -1), (2, 4), (5, 2)):
        with pytest.raises(ValueError, match=f"{num_ranks} ranks .* {num_nodes} nodes in equal blocks"):
            Roster(num_ranks, num_nodes)


def test_a_seat_that_is_new_was_never_given_up_nor_tried_again() -> None:
    new = Seat("s", "n", 1, 5.0)
    assert (new.endpoint, new.serve_rank, new.given_up_s, new.retries, new.serving) == (None, None, None, 0, False)
    assert new.retried_s == -math.inf
    new.endpoint = endpoint(1)
    assert new.serving


def test_seats_come_by_rank_and_are_found_by_shard() -> None:
    roster = Roster(3)
    for name, wanted in (("c", 2), ("a", 0), ("b", 1)):
        roster.join(name, "n", wanted, 1.5, 2.0)
    assert [(one.shard_id, one.node_id, one.rank, one.last_heartbeat_s, one.serve_rank) for one in roster.seats] == [
        ("a", "n", 0, 1.5, 0),
        ("b", "n", 1, 1.5, 1),
        ("c", "n", 2, 1.5, 2),
    ]
    assert roster.seat_of("b") is roster.seats[1]
    assert roster.seat_of("d") is None


# --- joining ------------------------------------------------------------------------------------------------------


def test_asking_again_is_a_sign_of_life() -> None:
    roster = Roster(2)
    roster.join("a", "n", 0, 0.0, 2.0)
    assert roster.join("a", "n", 1, 7.0, 2.0).reason == ""
    assert roster.seats[0].last_heartbeat_s == 7.0
    assert roster.expire(11.9, 5.0) == []


@pytest.mark.parametrize("wanted", [-1, 3, 99])
def test_a_rank_that_is_none_gives_way_to_the_first_free_one(wanted: int) -> None:
    roster = full_roster()
    roster.leave("s1")
    assert roster.join("new", "n", wanted, 0.0, 2.0).rank == 1


@pytest.mark.parametrize(("loading", "granted"), [(-1, False), (0, False), (1, True), (2, True), (3, False)])
def test_a_rank_that_is_loaded_is_granted_where_it_is_one_and_free(loading: int, granted: bool) -> None:
    roster = Roster(3)
    roster.join("s0", "n", 0, 0.0, 2.0)
    answer = roster.join("new", "m", 7, 9.0, 2.0, loading=loading)
    if granted:
        assert (answer.rank, answer.reason) == (loading, "")
        found = seat(roster, loading)
        assert (found.shard_id, found.node_id, found.last_heartbeat_s, found.serve_rank) == ("new", "m", 9.0, 7)
    else:
        assert answer.rank is None
        assert f"rank {loading} is taken" in answer.reason
        assert len(roster.seats) == 1


def test_a_successor_waits_out_the_patience_to_the_instant() -> None:
    roster = full_roster()
    for shard in ("s0", "s2"):
        roster.heartbeat(shard, 1.0)
    assert roster.join("new", "n", 1, 1.99, 2.0).rank is None
    assert roster.join("new", "n", 1, 2.0, 2.0).rank == 1
    assert (seat(roster, 1).shard_id, seat(roster, 1).last_heartbeat_s, seat(roster, 1).serving) == ("new", 2.0, False)


def test_a_free_rank_is_taken_before_the_seat_of_one_that_may_live() -> None:
    roster = full_roster()
    roster.leave("s0")
    assert roster.join("new", "n", 1, 9.0, 2.0).rank == 0
    assert roster.seat_of("s1") is not None


def test_a_successor_of_one_that_only_loaded_changes_nothing_for_routers() -> None:
    roster = Roster(1)
    roster.join("old", "n", 0, 0.0, 2.0)
    assert roster.join("new", "n", 0, 2.0, 2.0).rank == 0
    assert roster.epoch == 0


def test_a_full_roster_says_so() -> None:
    assert full_roster().join("new", "n", 1, 0.0, 2.0).reason == "all 3 ranks are taken"


def test_blocks_go_to_nodes_as_they_come() -> None:
    """Three nodes of two ranks: a node's first shard opens an empty block, the others fill it before any other."""
    roster = Roster(6, 3)
    asked = [("a1", 0), ("b1", 0), ("c1", 1), ("c2", 0), ("b2", 5), ("a2", 4)]
    ranks = {name: roster.join(name, name[0], wanted, 0.0, 2.0).rank for name, wanted in asked}
    assert ranks == {"a1": 0, "b1": 2, "c1": 4, "c2": 5, "b2": 3, "a2": 1}


def test_a_node_more_than_there_are_blocks_waits_while_one_is_empty_and_then_shares() -> None:
    roster = Roster(4, 2)
    assert roster.join("a1", "a", 0, 0.0, 2.0).rank == 0
    assert roster.join("b1", "b", 1, 0.0, 2.0).rank == 2, "rank 1 is of a's block while another is empty"
    assert roster.join("a2", "a", 3, 0.0, 2.0).rank == 1, "its own block first, whatever it wanted"
    assert roster.join("a3", "a", 1, 0.0, 2.0).rank == 3, "no room in its own"
    assert roster.join("c1", "c", 1, 0.0, 2.0).reason == "all 4 ranks are taken"
    roster.leave("b1")
    assert roster.join("c1", "c", 1, 0.0, 2.0).rank == 2, "all blocks were opened, so any rank suits"


# --- serving ------------------------------------------------------------------------------------------------------


def test_ready_is_for_the_seat_it_has_and_counts_once() -> None:
    roster = Roster(2)
    roster.join("a", "n", 0, 0.0, 2.0)
    assert not roster.ready("a", endpoint(1), 1.0)
    assert not roster.ready("b", endpoint(0), 1.0)
    assert (roster.epoch, roster.seats[0].last_heartbeat_s) == (0, 0.0)
    assert roster.ready("a", endpoint(0), 3.0)
    assert (roster.epoch, roster.seats[0].last_heartbeat_s, roster.endpoints) == (1, 3.0, (endpoint(0), None))
    assert roster.ready("a", endpoint(0), 4.0)
    assert (roster.epoch, roster.seats[0].last_heartbeat_s) == (1, 4.0), "the same once more is no change"
    roster.given_up(0, "a", 5.0)
    assert roster.ready("a", endpoint(0), 6.0)
    assert roster.seats[0].given_up_s == 5.0
    assert roster.ready("a", endpoint(0, "b"), 7.0)
    assert (roster.epoch, roster.seats[0].given_up_s, roster.endpoints[0]) == (2, None, endpoint(0, "b"))


@pytest.mark.parametrize("rank", [-1, 3])
def test_a_shard_of_a_rank_that_is_none_does_not_come_back(rank: int) -> None:
    roster = Roster(3)
    assert not roster.rejoin("s", "n", endpoint(rank), 4, 0.0)
    assert (roster.seats, roster.epoch) == ([], 5), "but its epoch was given out"


def test_coming_back_is_told_to_routers_and_remembered_whole() -> None:
    roster = Roster(3)
    assert roster.rejoin("s", "m", endpoint(2), 4, 6.0, 1)
    found = seat(roster, 2)
    assert (found.shard_id, found.node_id, found.last_heartbeat_s, found.serve_rank) == ("s", "m", 6.0, 1)
    assert (roster.epoch, roster.endpoints) == (6, (None, None, endpoint(2)))
    assert roster.rejoin("s", "m", endpoint(2), 4, 8.0, 1), "once more"
    assert (roster.epoch, found.last_heartbeat_s) == (6, 8.0)
    assert not roster.rejoin("t", "m", endpoint(2), 4, 9.0, 1)
    assert roster.rejoin("u", "m", endpoint(0), 0, 9.0)
    assert seat(roster, 0).serve_rank is None


def test_signs_of_life() -> None:
    roster = full_roster()
    assert roster.heartbeat("s1", 4.0)
    assert not roster.heartbeat("s9", 4.0)
    assert [one.last_heartbeat_s for one in roster.seats] == [0.0, 4.0, 0.0]


def test_leaving_frees_the_seat_and_tells_routers() -> None:
    roster = full_roster()
    roster.leave("s1")
    assert (roster.epoch, roster.missing, roster.complete) == (4, [1], False)
    roster.leave("s1")
    assert roster.epoch == 4


def test_silence_counts_from_the_last_sign_and_to_the_instant() -> None:
    roster = full_roster()
    roster.heartbeat("s1", 1.0)
    assert roster.expire(4.99, 5.0) == []
    assert roster.expire(5.0, 5.0) == [0, 2]
    assert roster.expire(5.99, 5.0) == []
    assert roster.expire(6.0, 5.0) == [1]
    assert roster.epoch == 6
    joined_in_reverse = Roster(3)
    for rank in (2, 0, 1):
        joined_in_reverse.join(f"s{rank}", "n", rank, 0.0, 2.0)
    assert joined_in_reverse.expire(9.0, 5.0) == [0, 1, 2]
    assert joined_in_reverse.epoch == 0


def test_a_pause_is_credited_up_to_now() -> None:
    roster = full_roster()
    roster.heartbeat("s1", 9.0)
    roster.given_up(1, "a", 9.5)
    roster.given_up(2, "a", 1.0)
    roster.credit_pause(6.0, 10.0)
    assert [one.last_heartbeat_s for one in roster.seats] == [6.0, 10.0, 6.0]
    assert [one.given_up_s for one in roster.seats] == [None, 10.0, 7.0]


# --- trying again -------------------------------------------------------------------------------------------------


def test_only_the_incarnation_that_serves_is_given_up_and_only_the_first_time_counts() -> None:
    roster = Roster(3)
    roster.given_up(0, "a", 1.0)
    roster.join("s0", "n", 0, 0.0, 2.0)
    roster.given_up(0, "a", 1.0)
    assert seat(roster, 0).given_up_s is None, "it loads, so nobody can have gone without it"
    roster.ready("s0", endpoint(0), 2.0)
    roster.given_up(0, "b", 3.0)
    assert seat(roster, 0).given_up_s is None
    roster.given_up(0, "a", 4.0)
    roster.given_up(0, "a", 5.0)
    assert seat(roster, 0).given_up_s == 4.0


def test_a_retry_is_due_to_the_instant_for_those_that_were_heard_since() -> None:
    roster = full_roster(now_s=1.0)
    for rank in (2, 1, 0):
        roster.given_up(rank, "a", 1.0)
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
        roster.given_up(1, "a", now_s)
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
        roster.given_up(1, "a", now_s)
        now_s += pause
        roster.heartbeat("s1", now_s)
        assert roster.retry(now_s, 5.0) == [1]
    now_s += well_s
    roster.given_up(1, "a", now_s)
    roster.heartbeat("s1", now_s + 1)
    assert roster.retry(now_s + pause_s - 0.1, 5.0) == []
    assert roster.retry(now_s + pause_s, 5.0) == [1]


def test_epochs_of_earlier_controllers_are_left_behind() -> None:
    roster = Roster(1)
    roster.raise_epoch_above(0)
    assert roster.epoch == 1
    roster.raise_epoch_above(0)
    assert roster.epoch == 1
    roster.raise_epoch_above(1)
    assert roster.epoch == 2
