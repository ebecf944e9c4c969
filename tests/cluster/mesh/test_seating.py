"""Which rank a shard gets: at a cold start, as a replacement, as one more, and after a restart of the controller."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from cluster.mesh.messages import JoinRequest
from cluster.mesh.planning import ShardsAtHand
from cluster.mesh.roster import Roster
from cluster.mesh.seating import LEAST_PATIENCE_S, SeatAnswer, Seating
from cluster.mesh.target import Target, TargetKeeper
from placement.placement import Placement
from tests.support.rosters import endpoint

HEARTBEAT_S = 1.0


@dataclass
class Scene:
    """A roster and who is seated in it, with a clock."""

    now_s: float = 0.0
    settled: bool = True
    roster: Roster = field(default_factory=Roster)
    keeper: TargetKeeper = field(default_factory=TargetKeeper)
    vacated: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.seating = Seating(self.roster, self.keeper, self.vacated.append)

    def join(self, name: str, serve_rank: int = 0, node: str = "n", loading: int | None = None) -> SeatAnswer:
        request = JoinRequest(name, node, serve_rank, loading)
        return self.seating.join(request, self.now_s, heartbeat_s=HEARTBEAT_S, settled=self.settled, wanted=3)

    def gather(self, wanted: int) -> ShardsAtHand | None:
        return self.seating.gather(self.now_s, heartbeat_s=HEARTBEAT_S, wanted=wanted)

    def target(self, num_ranks: int) -> None:
        self.keeper.set(Target(1, "first", Placement.linear(1, 6, num_ranks)), dict.fromkeys(range(num_ranks), 6))

    def seats(self) -> dict[int, str]:
        return {seat.rank: seat.shard_id for seat in self.roster.seats}


def started(num_ranks: int = 3) -> Scene:
    """Shards s0, s1, ... serve, with Serve's ranks 0, 1, ..."""
    scene = Scene()
    for rank in range(num_ranks):
        scene.join(f"s{rank}", rank)
    assert scene.gather(num_ranks) is not None
    scene.target(num_ranks)
    for rank in range(num_ranks):
        assert scene.join(f"s{rank}", rank).rank == rank
        assert scene.roster.ready(f"s{rank}", endpoint(rank), 6, 0.0)
    return scene


# --- cold start ---------------------------------------------------------------------------------------------------


def test_a_cold_start_waits_for_all_and_seats_them_node_by_node() -> None:
    scene = Scene()
    for name, serve_rank in (("b1", 0), ("a1", 1), ("b2", 2)):
        answer = scene.join(name, serve_rank, name[0])
        assert answer.rank is None
        assert scene.gather(4) is None
    assert "3 of 3 shards are here" in scene.join("b2", 2, "b").reason
    scene.join("a2", 3, "a")
    assert scene.gather(4) == ShardsAtHand(4, 2, None)
    assert scene.seats() == {0: "a1", 1: "a2", 2: "b1", 3: "b2"}
    assert scene.join("a1", 1, "a") == SeatAnswer(None, "the placement is being planned")
    scene.target(4)
    assert scene.join("a1", 1, "a") == SeatAnswer(0, "")


def test_one_shard_at_least_is_needed_whatever_serve_wants() -> None:
    scene = Scene()
    assert scene.gather(0) is None
    scene.join("s0")
    assert scene.gather(0) == ShardsAtHand(1, 1, None)


def test_a_shard_that_asks_no_more_is_not_waited_with() -> None:
    scene = Scene()
    scene.join("s0", 0)
    scene.now_s = LEAST_PATIENCE_S
    scene.join("s1", 1)
    assert scene.gather(2) is None, "s0 is gone"
    scene.join("s2", 0)
    assert scene.gather(2) == ShardsAtHand(2, 1, None)
    assert sorted(scene.seats().values()) == ["s1", "s2"]


def test_asking_again_keeps_a_shard_in_a_cold_start() -> None:
    scene = Scene()
    scene.join("s0", 0)
    scene.now_s = LEAST_PATIENCE_S - 0.1
    scene.join("s0", 0)
    scene.now_s = 2 * LEAST_PATIENCE_S - 0.3
    scene.join("s1", 1)
    assert scene.gather(2) is not None


@pytest.mark.parametrize(
    ("nodes", "num_nodes"), [("aabb", 2), ("abab", 2), ("aab", 1), ("aaa", 1), ("abc", 3), ("aabbcc", 3)]
)
def test_nodes_count_if_each_has_equally_many(nodes: str, num_nodes: int) -> None:
    scene = Scene()
    for index, node in enumerate(nodes):
        scene.join(f"s{index}", index, node)
    assert scene.gather(len(nodes)) == ShardsAtHand(len(nodes), num_nodes, None)


def test_shards_at_hand_are_those_that_stay_with_the_fewest_slots_of_any() -> None:
    scene = started(3)
    for name, slots in (("s0", 7), ("s1", 5), ("s2", 4)):
        rank = int(name[1])
        assert scene.roster.ready(name, endpoint(rank), slots, 0.0)
    assert scene.seating.shards_at_hand() == ShardsAtHand(3, 1, 4)
    scene.roster.seats[2].draining = "stops"
    assert scene.seating.shards_at_hand() == ShardsAtHand(2, 1, 5)


def test_nodes_whose_ranks_are_mixed_do_not_count() -> None:
    scene = Scene()
    for rank, node in enumerate("abab"):
        scene.roster.sit(f"s{rank}", node, rank, rank, 0.0)
    assert scene.seating.shards_at_hand().num_nodes == 1


# --- later --------------------------------------------------------------------------------------------------------


def test_one_more_shard_gets_the_lowest_free_rank() -> None:
    scene = started(3)
    assert scene.join("new", 3) == SeatAnswer(3, "")
    assert scene.vacated == []


def test_a_rank_that_is_awaited_goes_first() -> None:
    scene = started(3)
    scene.roster.leave("s1")
    scene.roster.sit("guest", "n", 1, 8, 0.0)
    scene.roster.leave("s2")
    scene.keeper.set(Target(2, "command", Placement.linear(1, 6, 3)), {0: 6, 2: 6})
    assert scene.join("new", 5).rank == 2


def test_a_replacement_takes_the_rank_once_its_predecessor_is_silent() -> None:
    scene = started(3)
    scene.now_s = 1.9
    for name in ("s0", "s2"):
        scene.roster.heartbeat(name, 1.9)
    answer = scene.join("new", 1)
    assert (answer.rank, answer.reason) == (None, "a shard with Serve's rank 1 was heard just now")
    scene.now_s = 2 * HEARTBEAT_S
    assert scene.join("new", 1).rank == 1
    assert scene.vacated == [1]
    assert scene.seats() == {0: "s0", 1: "new", 2: "s2"}
    assert not scene.roster.heartbeat("s1", scene.now_s)


def test_a_shard_whose_predecessor_is_heard_again_and_again_gets_a_rank_of_its_own() -> None:
    scene = started(3)
    for half in range(8):
        scene.now_s = half / 2
        for name in ("s0", "s1", "s2"):
            scene.roster.heartbeat(name, scene.now_s)
        assert scene.join("new", 1).rank is None
    scene.now_s = 4.0
    scene.roster.heartbeat("s1", 4.0)
    assert scene.join("new", 1).rank == 3, "no two shards that live have one rank of Serve's: it is mistaken"
    assert scene.seats()[1] == "s1"


def test_a_successor_of_one_that_hands_on_does_not_wait_for_it() -> None:
    scene = started(3)
    scene.roster.seats[1].draining = "stops"
    assert scene.join("new", 1).rank == 3


def test_asking_again_is_a_sign_of_life_and_gives_the_same_rank() -> None:
    scene = started(1)
    scene.now_s = 7.0
    assert scene.join("s0", 5, "elsewhere") == SeatAnswer(0, "")
    assert scene.roster.seats[0].last_heartbeat_s == 7.0


# --- after a restart of the controller ----------------------------------------------------------------------------


def test_a_controller_that_has_just_started_seats_nobody() -> None:
    scene = Scene(settled=False)
    answer = scene.join("new", 0)
    assert answer.rank is None
    assert "learns who serves already" in answer.reason
    assert scene.gather(1) is None, "nor does it remember who asked"


@pytest.mark.parametrize(("loading", "granted"), [(-1, False), (0, False), (1, True), (7, True)])
def test_a_shard_that_loads_gets_its_rank_again_or_none(loading: int, granted: bool) -> None:
    scene = Scene(settled=False)
    scene.roster.sit("s0", "n", 0, 0, 0.0)
    scene.target(3)
    answer = scene.join("new", 4, "m", loading)
    if granted:
        assert answer == SeatAnswer(loading, "")
        seat = scene.roster.at(loading)
        assert seat is not None
        assert (seat.shard_id, seat.node_id, seat.serve_rank, seat.serving) == ("new", "m", 4, False)
    else:
        assert answer == SeatAnswer(None, f"rank {loading} is taken")
        assert scene.seats() == {0: "s0"}


def test_a_shard_that_loaded_in_a_cold_start_counts_for_the_plan() -> None:
    scene = Scene()
    assert scene.join("old", 0, loading=2) == SeatAnswer(None, "the placement is being planned")
    scene.join("new", 1)
    assert scene.gather(2) == ShardsAtHand(2, 1, None)
    assert scene.seats() == {0: "new", 2: "old"}
