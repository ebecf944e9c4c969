"""Memberships as bytes: whole ones and differences lead to the same thing, and nothing wrong is taken for one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.protocol.membership import Membership, ShardEndpoint
from experts.protocol.membership_bytes import UnknownEpochError, epochs_in
from placement.placement import Placement

EXPERTS = 6


def endpoint(rank: int, incarnation: str) -> ShardEndpoint:
    return ShardEndpoint(rank, incarnation, f"10.0.0.{rank}", 1000 + rank, "host", 7)


@st.composite
def memberships(draw: st.DrawFn, epoch: int = 1, layers: int | None = None) -> Membership:
    ranks = draw(st.integers(1, 4))
    slots = ranks * draw(st.integers(1, 3))
    layers = layers or draw(st.integers(1, 3))
    expert = st.integers(-1, EXPERTS - 1)
    map_LS = draw(st.lists(st.lists(expert, min_size=slots, max_size=slots), min_size=layers, max_size=layers))
    nodes = draw(st.none() | st.lists(st.integers(0, 1), min_size=ranks, max_size=ranks))
    speeds = draw(st.none() | st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=ranks, max_size=ranks))
    placement = Placement(
        ranks,
        1 if nodes is None else 2,
        EXPERTS,
        np.array(map_LS),
        None if nodes is None else tuple(nodes),
        True,
        None if speeds is None else tuple(speeds),
    )
    names = draw(st.lists(st.none() | st.sampled_from("abc"), min_size=ranks, max_size=ranks))
    return Membership(
        epoch, placement, tuple(None if name is None else endpoint(rank, name) for rank, name in enumerate(names))
    )


def same(one: Membership, other: Membership) -> bool:
    mine, theirs = one.placement, other.placement
    left, right = ((each.nodes, each.num_nodes, each.partial, each.speeds) for each in (mine, theirs))
    return one == other and left == right


@given(memberships())
def test_a_whole_membership_comes_back(membership: Membership) -> None:
    data = membership.to_bytes()
    assert epochs_in(data) == (1, -1)
    assert same(Membership.from_bytes(data), membership)


@given(memberships(), st.data())
def test_a_difference_leads_to_the_same_membership(before: Membership, data: st.DataObject) -> None:
    """Slots change, shards come and go, ranks are added and taken away."""
    if data.draw(st.booleans()):
        after = data.draw(memberships(epoch=5))
    else:
        map_LS = before.placement.physical_to_logical_map.copy()
        for _ in range(data.draw(st.integers(0, 3))):
            layer, slot = (data.draw(st.integers(0, size - 1)) for size in map_LS.shape)
            map_LS[layer, slot] = data.draw(st.integers(-1, EXPERTS - 1))
        endpoints = list(before.endpoints)
        rank = data.draw(st.integers(0, len(endpoints) - 1))
        endpoints[rank] = data.draw(st.none() | st.just(endpoint(rank, "z")))
        after = Membership(5, replace(before.placement, physical_to_logical_map=map_LS), tuple(endpoints))
    told = after.delta_from(before)
    assert same(Membership.from_bytes(told, before), after)
    assert len(told) <= len(after.to_bytes())
    if epochs_in(told)[1] >= 0:
        for wrong in (None, replace(before, epoch=2)):
            with pytest.raises(UnknownEpochError):
                Membership.from_bytes(told, wrong)


def large(epoch: int) -> Membership:
    placement = Placement.linear(58, 256, 64)
    return Membership(epoch, placement, tuple(endpoint(rank, "a") for rank in range(64)))


def test_a_moved_expert_of_a_large_model_is_told_in_a_few_bytes() -> None:
    before = large(1)
    map_LS = before.placement.physical_to_logical_map.copy()
    map_LS[7, [0, 255]] = map_LS[7, [255, 0]]
    told = Membership(2, Placement(64, 1, 256, map_LS), before.endpoints).delta_from(before)
    assert len(told) < 100
    assert 30_000 < len(before.to_bytes()) < 45_000


def test_a_difference_that_leads_to_another_map_is_noticed() -> None:
    """Two lives of a controller may give out the same number."""
    before = large(1)
    map_LS = before.placement.physical_to_logical_map.copy()
    map_LS[7, [0, 255]] = map_LS[7, [255, 0]]
    told = Membership(2, Placement(64, 1, 256, map_LS), before.endpoints).delta_from(before)
    other_LS = before.placement.physical_to_logical_map.copy()
    other_LS[3, [0, 255]] = other_LS[3, [255, 0]]
    with pytest.raises(UnknownEpochError, match="builds on another epoch 1"):
        Membership.from_bytes(told, Membership(1, Placement(64, 1, 256, other_LS), before.endpoints))


def test_an_older_or_equal_epoch_is_no_base() -> None:
    for base in (None, large(3), large(4)):
        assert epochs_in(large(3).delta_from(base)) == (3, -1)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda data: data[:10], "10 bytes that are no membership"),
        (lambda data: b"x" * len(data), "bytes that are no membership"),
        (lambda data: data[:-1], "a map of .* bytes, expected"),
        (lambda data: data[:-4] + b"\0\0\1\0", "arrived damaged"),
        (lambda data: data[:4] + b"\7" + data[5:], "a membership of version 7"),
        (lambda data: data[:40] + b"\xff" * 5 + data[45:], "the JSON of membership 3 cannot be read"),
    ],
)
def test_other_bytes_are_refused(spoil: object, text: str) -> None:
    told = large(3)
    told = replace(told, placement=replace(told.placement, partial=True))
    with pytest.raises(ValueError, match=text):
        Membership.from_bytes(spoil(told.to_bytes()))  # type: ignore[operator]
