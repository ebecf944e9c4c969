"""Orders by rank: given out one after the other, and what was told to be released is told once."""

from __future__ import annotations

import numpy as np

from cluster.mesh.holdings import Holdings
from cluster.mesh.order_book import OrderBook
from experts.protocol.orders import CopyOrder


def book(num_ranks: int = 2) -> tuple[OrderBook, Holdings]:
    """Every rank holds three experts of one layer."""
    holdings = Holdings(1, 3)
    for rank in range(num_ranks):
        holdings.add(rank, 3, "n", np.ones((1, 3), np.bool_))
    return OrderBook(holdings), holdings


def test_orders_come_in_the_order_in_which_they_were_given() -> None:
    orders, _ = book()
    assert orders.next(0, -1) is None
    orders.add(0, [(0, 1)], [], None)
    orders.add(1, [], [CopyOrder(0, 2)], 5.0)
    orders.add(0, [], [CopyOrder(0, 1)], 6.0)
    first = orders.next(0, -1)
    assert first is not None
    assert (first.version, first.release, first.copy, first.max_bytes_per_s) == (1, ((0, 1),), (), None)
    assert orders.next(0, -1) is first, "until the shard says that it did it"
    second = orders.next(0, first.version)
    assert second is not None
    assert (second.version, second.copy) == (3, (CopyOrder(0, 1),))
    assert orders.next(0, second.version) is None
    other = orders.next(1, first.version)
    assert other is not None
    assert other.version == 2 == orders.last_version - 1, "versions count over all ranks"


def test_a_shard_that_knows_nothing_starts_with_the_oldest_that_is_left() -> None:
    orders, _ = book()
    for expert in range(3):
        orders.add(0, [], [CopyOrder(0, expert)], None)
    assert getattr(orders.next(0, 1), "version", None) == 2
    assert getattr(orders.next(0, -1), "version", None) == 2, "the first is done"


def test_another_shard_gets_none_of_the_orders_of_its_predecessor() -> None:
    orders, holdings = book()
    holdings.retire(0, [(0, 0)], 1)
    holdings.retire(1, [(0, 0)], 1)
    for rank in (0, 1):
        orders.add(rank, orders.take_releases(rank, 1), [], None)
    orders.forget(0)
    assert orders.next(0, -1) is None
    assert orders.next(1, -1) is not None
    assert orders.releasing == {(1, 0, 0)}
    orders.forget(5)


def test_a_release_is_taken_once_and_only_when_no_router_is_behind() -> None:
    orders, holdings = book()
    holdings.retire(0, [(0, 0)], 3)
    holdings.retire(0, [(0, 1)], 5)
    assert orders.take_releases(0, 2) == []
    assert orders.take_releases(0, 4) == [(0, 0)]
    assert orders.take_releases(0, 5) == [(0, 1)]
    assert orders.take_releases(0, 9) == []
    assert orders.releasing == {(0, 0, 0), (0, 0, 1)}


def test_what_the_shard_no_longer_holds_is_released() -> None:
    orders, holdings = book()
    holdings.retire(0, [(0, 0), (0, 1)], 3)
    holdings.retire(1, [(0, 0)], 3)
    for rank in (0, 1):
        orders.take_releases(rank, 3)
    left_LE = np.array([[False, True, True]])
    holdings.report(0, left_LE)
    orders.held(0, left_LE)
    assert orders.releasing == {(0, 0, 1), (1, 0, 0)}
    everything_LE = np.ones((1, 3), np.bool_)
    holdings.report(0, everything_LE)
    holdings.publish(0, [(0, 0)])
    holdings.retire(0, [(0, 0)], 8)
    assert orders.take_releases(0, 8) == [(0, 0)], "copied again, it can be released again"
