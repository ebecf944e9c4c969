"""What a router counts, whom it asks, for how long it waits and what it closes, number by number.

Legend: L MoE layers, E logical experts, R ranks.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experts.dispatch import dispatcher as dispatcher_module
from experts.protocol.membership import Membership
from experts.protocol.wire import H_EPOCH, H_LAYER, H_SEQ, exchange_bytes, header_of
from placement.placement import Placement
from tests.support.constant_experts import EXPERTS, LAYERS, D, dispatcher, forward, links_of
from tests.support.fake_links import FakeLink, lost

VALUES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
ROW_BYTES = 4 * D


def everywhere(num_ranks: int = 2) -> Placement:
    """Every rank has every expert."""
    return Placement(num_ranks, 1, EXPERTS, np.array([list(range(EXPERTS)) * num_ranks] * LAYERS))


def test_the_counts_of_a_step() -> None:
    found, _ = dispatcher(VALUES)
    stats = found.stats
    # Ranks hold {0, 1}, {2, 3}, {4, 5}.
    ids = [(0, 1, 2), (3, 5, -1), (-1, -1, -1), (4, -1, 0)]
    for layer in range(LAYERS):
        assert forward(found, ids, layer)[:, 0].tolist() == [(-1) ** layer * one for one in (7.0, 40.0, 0.0, 17.0)]
    assert (stats.steps, stats.dispatches, stats.rows) == (1, 2, 8), "a step begins with layer 0"
    assert stats.shard_rows.tolist() == [4, 4, 4]
    assert stats.shard_pairs.tolist() == [6, 4, 4]
    assert (stats.fan_out_sum, stats.failovers, stats.fallback_pairs) == (12, 0, 0)
    whole = sum(exchange_bytes(2, pairs, ROW_BYTES) for pairs in (3, 2, 2)) * LAYERS
    assert stats.bytes_received == LAYERS * 3 * (128 + 2 * ROW_BYTES)
    assert stats.bytes_sent + stats.bytes_received == whole
    assert (stats.plan_pack.count, stats.wait.count, stats.combine.count) == (2, 2, 2)
    assert min(stats.plan_pack.sum_ns, stats.wait.sum_ns, stats.combine.sum_ns) > 0
    assert stats.balancedness == pytest.approx(14 / 3 / 6)


@pytest.mark.parametrize("apart", [False, True])
def test_a_step_of_more_rows_than_a_message_takes_goes_in_several(apart: bool) -> None:
    found, links = dispatcher(VALUES, apart=apart, max_rows=2)
    got = forward(found, [(0, 2, 4), (1, 3, 5), (0, 3, 4), (1, 2, 5), (5, -1, -1)])
    assert got[:, 0].tolist() == [21.0, 42.0, 25.0, 38.0, 32.0]
    assert [len(link.posted) for link in links.values()] == [2, 2, 3]
    stats = found.stats
    assert (stats.dispatches, stats.rows, stats.steps) == (1, 5, 1)
    assert (stats.plan_pack.count, stats.wait.count, stats.combine.count) == (3, 3, 3)


def test_no_rows_are_no_messages() -> None:
    found, links = dispatcher(VALUES)
    assert forward(found, []).shape == (0, D)
    assert [link.posted for link in links.values()] == [[], [], []]
    assert (found.stats.dispatches, found.stats.rows, found.stats.last_success_s) == (1, 0, None)


def test_every_message_has_a_number_of_its_own_and_says_layer_and_epoch() -> None:
    found, links = dispatcher(VALUES)
    seen = []
    for layer in (0, 1, 0):
        forward(found, [(0, 2, 4)], layer)
        headers = [header_of(link.send_buffer) for link in links.values()]
        assert [int(header[H_LAYER]) for header in headers] == [layer] * 3
        assert [int(header[H_EPOCH]) for header in headers] == [1] * 3
        seen += [int(headers[0][H_SEQ])]
    assert len(set(seen)) == 3


@pytest.mark.parametrize("apart", [False, True])
def test_each_layer_balances_its_own_load(apart: bool) -> None:
    """In each layer the first token goes to rank 0, and the next to rank 1, which had less in that layer."""
    found, links = dispatcher(VALUES, apart=apart, placement=everywhere())
    asked = []
    for layer in (0, 1, 0, 1, 1, 0):
        before = [len(link.posted) for link in links.values()]
        forward(found, [(0, 1, 2)], layer)
        asked += [rank for rank, link in links.items() if len(link.posted) > before[rank]]
    assert asked == [0, 0, 1, 1, 0, 0]


def test_a_new_epoch_goes_on_with_the_load_of_the_ranks_that_stay() -> None:
    """Epochs come several times a second; if each began anew, ties would fall to the first rank every time."""
    found, links = dispatcher(VALUES, placement=everywhere())
    forward(found, [(0, 1, 2)])
    found.apply(Membership(2, everywhere(), (None, None)), dict(links), {})
    forward(found, [(0, 1, 2)])
    assert [len(link.posted) for link in links.values()] == [1, 1]
    assert int(header_of(links[1].send_buffer)[H_EPOCH]) == 2


def test_local_replicas_come_first() -> None:
    found, links = dispatcher(VALUES, placement=everywhere())
    found.apply(Membership(2, everywhere(), (None, None)), dict(links), {}, np.array([False, True]))
    for _ in range(3):
        forward(found, [(0, 1, 2)])
    assert [len(link.posted) for link in links.values()] == [0, 3]


def test_a_wait_ends_timeout_s_after_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    found, links = dispatcher(VALUES)
    found.timeout_s = 7.5
    ticks = iter(range(10**12, 2 * 10**12, 1000))
    clock = SimpleNamespace(monotonic=lambda: 1000.0, monotonic_ns=ticks.__next__)
    monkeypatch.setattr(dispatcher_module, "time", clock)
    deadlines: list[float] = []
    for link in links.values():
        wait = link.wait

        def noted(deadline_s: float, wait: object = wait) -> int:
            deadlines.append(deadline_s)
            return wait(deadline_s)  # type: ignore[operator]

        link.wait = noted  # type: ignore[method-assign]
    forward(found, [(0, 2, 4)])
    assert deadlines == pytest.approx([1007.5] * 3, abs=1e-5)  # within ten ticks
    assert found.stats.last_success_s == 1000.0
    # Each look at the clock is a microsecond after the one before.
    assert (found.stats.plan_pack.sum_ns, found.stats.wait.sum_ns, found.stats.combine.sum_ns) == (1000, 1000, 1000)


# --- shards that fail ---------------------------------------------------------------------------------------------


def test_what_a_lost_shard_alone_had_is_computed_here_once(caplog: pytest.LogCaptureFixture) -> None:
    found, links = dispatcher(VALUES)
    links[1].wait_faults = [lost]
    got = forward(found, [(0, 1, 4), (2, 3, 5), (2, -1, 0)])
    assert got[:, 0].tolist() == [19.0, 44.0, 5.0]
    assert found.fallback.calls == [(0, [[2, 3, -1], [2, -1, -1]])]  # type: ignore[union-attr]
    stats = found.stats
    assert (stats.failovers, stats.fallback_pairs) == (1, 3)
    assert (stats.shard_rows.tolist(), stats.shard_pairs.tolist(), stats.fan_out_sum) == ([2, 0, 2], [3, 0, 2], 4)
    assert (stats.rows, stats.dispatches) == (3, 1)
    assert [record.args for record in caplog.records if record.levelno == logging.ERROR] == [(1, found.lost[1])]
    # From now on nobody asks it, and nothing fails over.
    assert forward(found, [(3, -1, -1)], layer=1)[:, 0].tolist() == [-8.0]
    assert (stats.failovers, stats.fallback_pairs, len(links[1].posted)) == (1, 4, 1)
    assert found.fallback.calls[1:] == [(1, [[3, -1, -1]])]  # type: ignore[union-attr]


@pytest.mark.parametrize("apart", [False, True])
def test_what_another_shard_has_too_is_repeated_there(apart: bool) -> None:
    found, links = dispatcher(VALUES, apart=apart, placement=everywhere())
    links[0].wait_faults = [lost]
    assert forward(found, [(0, 1, 2), (3, 4, 5)])[:, 0].tolist() == [7.0, 56.0]
    stats = found.stats
    assert (stats.failovers, stats.fallback_pairs) == (1, 0)
    assert (stats.shard_rows.tolist(), stats.shard_pairs.tolist(), stats.fan_out_sum) == ([0, 2], [0, 6], 2)
    assert [len(link.posted) for link in links.values()] == [1, 2]
    assert (links[0].closed, links[1].closed) == (True, False)
    assert (list(found.links), list(found.lost)) == ([1], [0])
    assert (stats.plan_pack.count, stats.wait.count, stats.combine.count) == (1, 2, 2)


@pytest.mark.parametrize("stage", ["post", "wait"])
def test_bytes_count_where_they_went(stage: str) -> None:
    found, links = dispatcher(VALUES)
    faults = links[0].post_faults if stage == "post" else links[0].wait_faults
    faults.append(lost)
    forward(found, [(0, 2, 4)])
    one_way = exchange_bytes(1, 1, ROW_BYTES) - 128 - ROW_BYTES
    assert found.stats.bytes_sent == (2 if stage == "post" else 3) * one_way
    assert found.stats.bytes_received == 2 * (128 + ROW_BYTES)


def test_without_a_fallback_what_nobody_has_is_an_error() -> None:
    found, links = dispatcher(VALUES)
    found.fallback = None
    assert forward(found, [(0, 2, 4)])[:, 0].tolist() == [21.0]
    links[1].wait_faults = [lost]
    with pytest.raises(
        RuntimeError, match="experts have no live shard, and this dispatcher was made without a fallback"
    ):
        forward(found, [(0, 2, 4)])


def test_two_fail_one_after_the_other() -> None:
    found, links = dispatcher(VALUES, placement=everywhere(3))
    links[0].wait_faults, links[1].wait_faults = [lost], [lost]
    assert forward(found, [(0, 1, 2)])[:, 0].tolist() == [7.0]
    assert (found.stats.failovers, found.stats.shard_pairs.tolist()) == (2, [0, 0, 3])
    assert sorted(found.lost) == [0, 1]


# --- epochs -------------------------------------------------------------------------------------------------------


def test_links_that_are_not_in_the_new_epoch_are_closed_and_the_others_kept() -> None:
    found, links = dispatcher(VALUES)
    new = links_of(VALUES, torch.float32, False, Placement.linear(LAYERS, EXPERTS, 3))
    kept: dict[int, FakeLink] = {0: links[0], 2: new[2]}
    membership = Membership(5, Placement.linear(LAYERS, EXPERTS, 3), (None,) * 3)
    found.apply(membership, dict(kept), {1: "no shard"})
    assert [link.closed for link in links.values()] == [False, True, True]
    assert not new[2].closed
    assert (found.membership, found.links, found.lost) == (membership, kept, {1: "no shard"})
    assert forward(found, [(0, 2, 4)])[:, 0].tolist() == [21.0]
    assert found.stats.fallback_pairs == 1, "nobody asked rank 1"
    found.close()
    assert all(link.closed for link in kept.values())
    assert found.links == {}


def test_the_dictionaries_of_the_caller_stay_its_own() -> None:
    found, links = dispatcher(VALUES)
    mine, reasons = dict(links), {}
    found.apply(Membership(2, Placement.linear(LAYERS, EXPERTS, 3), (None,) * 3), mine, reasons)
    links[1].wait_faults = [lost]
    forward(found, [(0, 2, 4)])
    assert (sorted(mine), reasons) == ([0, 1, 2], {})


def test_counts_go_on_over_epochs_of_more_ranks() -> None:
    found, links = dispatcher(VALUES)
    forward(found, [(0, 2, 4)])
    more = Placement.linear(LAYERS, EXPERTS, 6)
    found.apply(Membership(2, more, (None,) * 6), dict(links_of(VALUES, torch.float32, False, more)), {})
    assert forward(found, [(3, 4, 5)])[:, 0].tolist() == [56.0]
    assert found.stats.shard_pairs.tolist() == [1, 1, 1, 1, 1, 1]
    assert links[0].closed
