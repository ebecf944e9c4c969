"""What shards hold and what is published: every transition, and all of them against plain sets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.mesh.holdings import Holdings, Pair, experts_by_rank, placement_of
from placement.placement import Placement

SHAPE = (2, 4)  # layers, experts
PAIRS = [(layer, expert) for layer in range(SHAPE[0]) for expert in range(SHAPE[1])]


def held(*pairs: Pair) -> np.ndarray:
    held_LE = np.zeros(SHAPE, np.bool_)
    for pair in pairs:
        held_LE[pair] = True
    return held_LE


def pairs_of(held_LE: np.ndarray) -> set[Pair]:
    return {(int(layer), int(expert)) for layer, expert in np.argwhere(held_LE)}


def one_rank(*pairs: Pair) -> Holdings:
    holdings = Holdings(*SHAPE)
    holdings.add(0, 4, "n", held(*pairs))
    return holdings


def published(holdings: Holdings, rank: int = 0) -> set[Pair]:
    return pairs_of(holdings.ranks[rank].published_LE)


def test_what_a_shard_brings_is_published() -> None:
    holdings = one_rank((0, 1), (1, 2))
    assert published(holdings) == {(0, 1), (1, 2)}
    assert holdings.releasable(0, 1 << 40) == []
    assert not holdings.publish_all(), "it is published already"
    assert not holdings.restore()


def test_holdings_are_copies() -> None:
    mine_LE = held((0, 0))
    holdings = Holdings(*SHAPE)
    holdings.add(0, 4, "n", mine_LE)
    mine_LE[0, 1] = True
    assert pairs_of(holdings.ranks[0].held_LE) == {(0, 0)}
    holdings.retire(0, [(0, 0)], 3)
    assert pairs_of(holdings.ranks[0].held_LE) == {(0, 0)}, "retired, and held still"


@pytest.mark.parametrize("held_LE", [np.zeros((2, 5), np.bool_), np.zeros((1, 4), np.bool_), np.zeros(SHAPE, np.int8)])
def test_a_shard_of_another_model_is_refused_with_both_shapes(held_LE: np.ndarray) -> None:
    holdings = one_rank()
    expected = rf"{held_LE.dtype} \[{held_LE.shape[0]}, {held_LE.shape[1]}\], expected bool \[2, 4\]"
    with pytest.raises(ValueError, match=expected):
        holdings.add(1, 4, "n", held_LE)
    with pytest.raises(ValueError, match=expected):
        holdings.report(0, held_LE)
    assert list(holdings.ranks) == [0]


def test_a_copy_is_held_first_and_then_published() -> None:
    holdings = one_rank((0, 0))
    assert not holdings.report(0, held((0, 0), (0, 1)))
    assert published(holdings) == {(0, 0)}
    holdings.publish(0, [(0, 1), (1, 1)])
    assert published(holdings) == {(0, 0), (0, 1)}, "what is not held is not published"


def test_publish_all_takes_up_what_nobody_planned() -> None:
    holdings = one_rank((0, 0), (0, 1))
    holdings.retire(0, [(0, 1)], 3)
    holdings.report(0, held((0, 0), (0, 1), (1, 3)))
    assert holdings.publish_all()
    assert published(holdings) == {(0, 0), (1, 3)}, "and leaves what is retired"
    assert not holdings.publish_all()


def test_a_retired_expert_may_be_released_from_its_epoch_on() -> None:
    holdings = one_rank((0, 0), (0, 1), (1, 1))
    holdings.retire(0, [(0, 1), (1, 1), (0, 3)], 7)
    assert published(holdings) == {(0, 0)}
    assert holdings.releasable(0, 6) == []
    assert holdings.releasable(0, 7) == [(0, 1), (1, 1)], "what was not published is not retired"
    holdings.retire(0, [(0, 1)], 9)
    assert holdings.releasable(0, 7) == [(0, 1), (1, 1)], "retired once"
    assert not holdings.report(0, held((0, 0), (1, 1)))
    assert holdings.releasable(0, 7) == [(1, 1)]


def test_what_was_released_and_copied_again_is_like_new() -> None:
    holdings = one_rank((0, 0))
    holdings.retire(0, [(0, 0)], 7)
    holdings.report(0, held())
    holdings.report(0, held((0, 0)))
    assert holdings.releasable(0, 7) == []
    assert holdings.publish_all()
    assert published(holdings) == {(0, 0)}


def test_what_is_retired_comes_back_unless_its_release_was_ordered() -> None:
    holdings = one_rank((0, 0), (0, 1), (0, 2))
    holdings.retire(0, [(0, 1), (0, 2)], 7)
    assert holdings.restore([(0, 0, 1), (5, 0, 2)])
    assert published(holdings) == {(0, 0), (0, 2)}
    assert holdings.releasable(0, 7) == [(0, 1)]
    assert not holdings.restore([(0, 0, 1)])
    assert holdings.restore()
    assert published(holdings) == {(0, 0), (0, 1), (0, 2)}


def test_publishing_what_is_retired_takes_the_retirement_back() -> None:
    holdings = one_rank((0, 0))
    holdings.retire(0, [(0, 0)], 7)
    holdings.publish(0, [(0, 0)])
    assert holdings.releasable(0, 9) == []


def test_a_report_that_lacks_something_published_says_so() -> None:
    holdings = one_rank((0, 0), (0, 1), (0, 2))
    holdings.retire(0, [(0, 2)], 4)
    assert not holdings.report(0, held((0, 0), (0, 1)))
    assert holdings.report(0, held((0, 0)))
    assert published(holdings) == {(0, 0)}
    assert not holdings.report(0, held((0, 0))), "once"


@pytest.mark.parametrize(
    ("state", "tells"), [("published", True), ("retired", False), ("held", False), ("none", False)]
)
def test_a_shard_that_goes_matters_if_routers_used_it(state: str, tells: bool) -> None:
    holdings = one_rank(*([(0, 0)] if state in ("published", "retired") else []))
    if state == "retired":
        holdings.retire(0, [(0, 0)], 2)
    if state == "held":
        holdings.report(0, held((0, 0)))
    assert holdings.drop(0) == tells
    assert not holdings.drop(0)
    assert holdings.ranks == {}


def test_counts_are_of_what_is_published() -> None:
    holdings = one_rank((0, 0), (0, 1))
    holdings.add(3, 4, "n", held((0, 1), (1, 1)))
    holdings.retire(0, [(0, 0)], 2)
    assert holdings.count_LE.tolist() == [[0, 2, 0, 0], [0, 1, 0, 0]]
    assert pairs_of(holdings.held_placement(4).logical_replica_count > 0) == {(0, 1), (1, 1)}


def test_nodes_are_numbered_by_their_first_ranks_and_may_be_uneven() -> None:
    holdings = Holdings(*SHAPE)
    for rank, node in ((0, "x"), (1, "y"), (3, "y"), (4, "x"), (5, "y")):
        holdings.add(rank, 2, node, held(*((layer, rank % 4) for layer in range(2))))
    assert holdings.nodes(6) == (2, (0, 1, 0, 1, 0, 1)), "rank 2 is nobody's"
    placement = holdings.placement(6)
    assert (placement.num_nodes, placement.nodes) == (2, (0, 1, 0, 1, 0, 1))
    assert placement.partial
    assert Holdings(*SHAPE).nodes(2) == (1, (0, 0))
    one_node = Holdings(*SHAPE)
    one_node.add(0, 4, "x", np.ones(SHAPE, np.bool_))
    assert (one_node.placement(2).nodes, one_node.placement(2).partial) == (None, False)


@given(st.lists(arrays(np.bool_, SHAPE), min_size=1, max_size=4), st.integers(0, 2), st.integers(0, 2))
@settings(max_examples=100)
def test_a_placement_says_what_it_was_made_of(rows: list[np.ndarray], more_slots: int, more_ranks: int) -> None:
    width = max(1, *(int(row.sum(1).max()) for row in rows)) + more_slots
    made = placement_of(dict(enumerate(rows)), SHAPE, len(rows) + more_ranks, width)
    assert (made.num_ranks, made.slots_per_rank) == (len(rows) + more_ranks, width)
    assert made.partial == (not np.logical_or.reduce(rows).all())
    found = experts_by_rank(made)
    assert list(found) == list(range(made.num_ranks))
    for rank, row_LE in found.items():
        expected = rows[rank] if rank < len(rows) else np.zeros(SHAPE, np.bool_)
        assert np.array_equal(row_LE, expected)
    again = placement_of(found, SHAPE, made.num_ranks, width)
    assert np.array_equal(again.physical_to_logical_map, made.physical_to_logical_map)


def test_experts_of_a_placement_whose_slots_are_in_another_order() -> None:
    placement = Placement(2, 1, 3, np.array([[2, -1, 0, 1]], np.int32))
    assert {rank: row.tolist() for rank, row in experts_by_rank(placement).items()} == {
        0: [[False, False, True]],
        1: [[True, True, False]],
    }


ANY_PAIRS = st.sets(st.sampled_from(PAIRS))


class HoldingsMachine(RuleBasedStateMachine):
    """Two ranks, and the same as plain sets."""

    def __init__(self) -> None:
        super().__init__()
        self.holdings = Holdings(*SHAPE)
        self.held: dict[int, set[Pair]] = {}
        self.published: dict[int, set[Pair]] = {}
        self.retired: dict[int, dict[Pair, int]] = {}
        self.epoch = 0

    @rule(rank=st.integers(0, 1), pairs=ANY_PAIRS)
    def add(self, rank: int, pairs: set[Pair]) -> None:
        self.holdings.add(rank, 4, "n", held(*pairs))
        self.held[rank], self.published[rank], self.retired[rank] = set(pairs), set(pairs), {}

    @rule(rank=st.integers(0, 1))
    def drop(self, rank: int) -> None:
        assert self.holdings.drop(rank) == bool(self.published.pop(rank, set()))
        self.held.pop(rank, None)

    @rule(rank=st.integers(0, 1), pairs=ANY_PAIRS)
    def report(self, rank: int, pairs: set[Pair]) -> None:
        if rank in self.held:
            assert self.holdings.report(rank, held(*pairs)) == bool(self.published[rank] - pairs)
            self.held[rank] = set(pairs)
            self.published[rank] &= pairs
            self.retired[rank] = {pair: epoch for pair, epoch in self.retired[rank].items() if pair in pairs}

    @rule(rank=st.integers(0, 1), pairs=ANY_PAIRS)
    def publish(self, rank: int, pairs: set[Pair]) -> None:
        if rank in self.held:
            self.holdings.publish(rank, pairs)
            self.published[rank] |= pairs & self.held[rank]
            self.retired[rank] = {pair: epoch for pair, epoch in self.retired[rank].items() if pair not in pairs}

    @rule()
    def publish_all(self) -> None:
        stray = {rank: self.held[rank] - self.published[rank] - self.retired[rank].keys() for rank in self.held}
        assert self.holdings.publish_all() == any(stray.values())
        for rank, pairs in stray.items():
            self.published[rank] |= pairs

    @rule(rank=st.integers(0, 1), pairs=ANY_PAIRS)
    def retire(self, rank: int, pairs: set[Pair]) -> None:
        if rank in self.held:
            self.epoch += 1
            self.holdings.retire(rank, pairs, self.epoch)
            self.retired[rank].update(dict.fromkeys(pairs & self.published[rank], self.epoch))
            self.published[rank] -= pairs

    @rule(ordered=st.sets(st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 3))))
    def restore(self, ordered: set[tuple[int, int, int]]) -> None:
        back = {rank: {pair for pair in self.retired[rank] if (rank, *pair) not in ordered} for rank in self.held}
        assert self.holdings.restore(ordered) == any(back.values())
        for rank, pairs in back.items():
            self.published[rank] |= pairs
            for pair in pairs:
                del self.retired[rank][pair]

    @invariant()
    def it_is_as_the_sets_say(self) -> None:
        assert self.holdings.ranks.keys() == self.held.keys()
        for rank, each in self.holdings.ranks.items():
            assert pairs_of(each.held_LE) == self.held[rank]
            assert pairs_of(each.published_LE) == self.published[rank]
            for epoch in (self.epoch // 2, self.epoch):
                due = [pair for pair, first in self.retired[rank].items() if first <= epoch]
                assert self.holdings.releasable(rank, epoch) == sorted(due)
        counts = [[sum((layer, expert) in pairs for pairs in self.published.values()) for expert in range(SHAPE[1])]
                  for layer in range(SHAPE[0])]  # fmt: skip
        assert self.holdings.count_LE.tolist() == counts
        for rank, row_LE in experts_by_rank(self.holdings.placement(2)).items():
            assert pairs_of(row_LE) == self.published.get(rank, set())
        for rank, row_LE in experts_by_rank(self.holdings.held_placement(2)).items():
            assert pairs_of(row_LE) == self.held.get(rank, set()) - self.retired.get(rank, {}).keys() or (
                rank not in self.held
            )


TestHoldingsMachine = HoldingsMachine.TestCase
TestHoldingsMachine.settings = settings(max_examples=60, stateful_step_count=25)
