"""Seconds of a plan, by hand."""

from __future__ import annotations

import pytest

from placement.migration.price import CopyRates, expected_seconds
from placement.migration.rounds import Copy, Nearness, Round

RATES = CopyRates(node_bytes_per_s=10, between_nodes_bytes_per_s=5, checkpoint_bytes_per_s=1, round_s=0.5)


def copy(source: int, rank: int, nearness: Nearness, size_bytes: int = 10) -> Copy:
    return Copy(0, 0, source, -1 if source < 0 else 0, rank, 0, size_bytes, nearness)


def test_a_round_takes_as_long_as_its_busiest_link():
    parallel = Round((), (copy(0, 1, "node"), copy(2, 3, "node")), ())
    fan_out = Round((), (copy(0, 1, "node"), copy(0, 2, "node"), copy(0, 3, "rack")), ())
    both_ways = Round((), (copy(0, 1, "node"), copy(1, 0, "node")), ())
    assert expected_seconds([parallel], RATES) == pytest.approx(1.5)
    assert expected_seconds([fan_out], RATES) == pytest.approx(1 + 1 + 2 + 0.5)
    assert expected_seconds([both_ways, parallel], RATES) == pytest.approx(3.0)


def test_copies_between_nodes_share_the_link_of_their_node():
    across = Round((), (copy(0, 2, "rack"), copy(1, 3, "cluster"), copy(0, 1, "node")), ())
    assert expected_seconds([across], RATES) == pytest.approx(1 + 2 + 0.5)
    assert expected_seconds([across], RATES, nodes=[0, 0, 1, 1]) == pytest.approx(4.5)
    assert expected_seconds([across], RATES, nodes=[0, 1, 2, 3]) == pytest.approx(2.5)


def test_the_checkpoint_loads_the_reader_alone_and_a_round_without_copies_its_epochs():
    assert expected_seconds([Round((), (copy(-1, 0, "checkpoint"), copy(-1, 1, "checkpoint")), ())], RATES) == 10.5
    assert expected_seconds([Round((), (), ((0, 0, 0),))], RATES) == 0.5
    assert expected_seconds([], RATES) == 0


@pytest.mark.parametrize("name", ["node_bytes_per_s", "between_nodes_bytes_per_s", "checkpoint_bytes_per_s"])
def test_rates_must_be_above_zero(name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        CopyRates(**{"node_bytes_per_s": 1, "between_nodes_bytes_per_s": 1, "checkpoint_bytes_per_s": 1, name: 0})
