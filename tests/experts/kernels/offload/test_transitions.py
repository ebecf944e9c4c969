"""What earlier calls tell of the next layer, counted by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.kernels.offload.transitions import HALVED_AFTER, Transitions

L, S = 3, 6


def slots(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def noted(*calls: tuple[int, tuple[int, ...]]) -> Transitions:
    """After calls of (layer, slots)."""
    transitions = Transitions(L, S)
    for layer, used in calls:
        transitions.note(layer, slots(*used))
    return transitions


def test_what_followed_most_often_comes_first() -> None:
    """After slot 0 of layer 0: slot 5 three times of four, 4 twice, 3 once. A call uses one slot of a layer."""
    following = [(5,), (5, 4), (5, 4), (3,)]
    transitions = noted(*(call for used in following for call in ((0, (0,)), (1, used))))
    assert transitions.likely(0, slots(0), 0.5).tolist() == [5, 4]
    assert transitions.likely(0, slots(0), 0.51).tolist() == [5]
    assert transitions.likely(0, slots(0), 0.76).tolist() == []


def test_no_more_than_the_next_layer_uses() -> None:
    """A layer that uses one slot a call gets one, however many followed alike."""
    transitions = noted(*((layer, (slot,)) for slot in (2, 3, 4) for layer in (0, 1)))
    assert transitions.likely(0, slots(2, 3, 4), 0.1).tolist() == [2], "all alike: the first one"
    wide = noted(*((layer, (1, 2, 3)) for _ in range(60) for layer in (0, 1)))
    assert wide.likely(0, slots(1), 0.5).tolist() == [1, 2, 3]


def test_the_shares_of_all_slots_of_a_call_count_alike() -> None:
    transitions = noted((0, (0,)), (1, (5,)), (0, (0,)), (1, (4,)), (0, (1,)), (1, (5,)))
    assert transitions.likely(0, slots(0, 1), 0.75).tolist() == [5], "half and whole: three quarters"
    assert transitions.likely(0, slots(0, 1), 0.76).tolist() == []
    assert transitions.likely(0, slots(0, 1, 3), 0.75).tolist() == [5], "3 was never used: it says nothing"
    assert transitions.likely(0, slots(3), 0.0).tolist() == []


def test_the_first_layer_follows_the_last_and_skipped_layers_tell_nothing() -> None:
    transitions = noted((2, (1,)), (0, (4,)))
    assert transitions.likely(2, slots(1), 1.0).tolist() == [4]
    skipped = noted((0, (1,)), (2, (4,)))
    assert skipped.likely(0, slots(1), 0.0).tolist() == []
    assert skipped.likely(2, slots(4), 0.0).tolist() == []
    # The layer that came after the gap is where the next transition begins.
    skipped.note(0, slots(3))
    assert skipped.likely(2, slots(4), 1.0).tolist() == [3]


def test_a_slot_with_another_expert_is_forgotten_on_both_sides() -> None:
    calls = [(0, (0,)), (1, (5,)), (2, (5,)), (0, (5,))]
    transitions = noted(*calls)
    transitions.forget(1, 5)
    assert transitions.likely(0, slots(0), 0.1).tolist() == [], "nothing follows that is now another expert"
    assert transitions.likely(1, slots(5), 0.0).tolist() == [], "and what it was followed by is unknown"
    assert transitions.likely(2, slots(5), 1.0).tolist() == [5], "slot 5 of another layer is another slot"
    first = noted(*calls)
    first.forget(0, 5)
    assert first.likely(2, slots(5), 0.1).tolist() == []
    assert first.likely(0, slots(0), 1.0).tolist() == [5]


def test_what_a_slot_is_noted_for_after_that_begins_anew_and_others_stay() -> None:
    transitions = noted((0, (0,)), (1, (2,)), (0, (1,)), (1, (2, 4)))
    transitions.forget(0, 0)
    assert transitions.likely(0, slots(1), 1.0).tolist() == [2, 4]
    transitions.note(0, slots(0))
    transitions.note(1, slots(4))
    assert transitions.likely(0, slots(0), 1.0).tolist() == [4], "not 2, which followed the expert before"
    transitions.forget(1, 2)
    assert transitions.likely(0, slots(1), 1.0).tolist() == [4]


def test_old_calls_count_less_and_less() -> None:
    """Slot 1 followed for as many calls as are halved at once; then 2 follows for half as many, and is as likely."""
    transitions = Transitions(2, 4)

    def follows(slot: int, times: int) -> None:
        for _ in range(times):
            transitions.note(0, slots(0))
            transitions.note(1, slots(slot))

    follows(1, HALVED_AFTER)
    follows(2, HALVED_AFTER // 2 - 1)
    assert transitions.likely(0, slots(0), 0.5).tolist() == [1]
    follows(2, 2)
    assert transitions.likely(0, slots(0), 0.5).tolist() == [2]


@settings(max_examples=40)
@given(
    calls=st.lists(st.tuples(st.integers(0, L - 1), st.sets(st.integers(0, S - 1), min_size=1)), max_size=30),
    layer=st.integers(0, L - 1),
    asked=st.sets(st.integers(0, S - 1), min_size=1),
    least=st.sampled_from((0.0, 0.25, 0.5)),
)
def test_shares_are_those_of_counting(
    calls: list[tuple[int, set[int]]], layer: int, asked: set[int], least: float
) -> None:
    transitions = noted(*((at, tuple(sorted(used))) for at, used in calls))
    pairs = [
        (before[1], after[1])
        for before, after in itertools.pairwise(calls)
        if before[0] == layer and after[0] == (layer + 1) % L
    ]
    shares: list[list[float]] = []
    for slot in sorted(asked):
        followed = [after for used, after in pairs if slot in used]
        if followed:
            shares.append([sum(other in after for after in followed) / len(followed) for other in range(S)])
    width = 1.0
    for at, used in calls:
        if at == (layer + 1) % L:
            width += 0.05 * (len(used) - width)
    found = transitions.likely(layer, slots(*sorted(asked)), least).tolist()
    if not shares:
        assert found == []
        return
    mean_S = np.mean(shares, axis=0)
    assert all(mean_S[slot] >= least - 1e-6 for slot in found)
    assert [mean_S[slot] for slot in found] == pytest.approx(sorted(mean_S, reverse=True)[: len(found)])
    most = int(np.ceil(width - 1e-4))
    assert min(most, int((mean_S >= least + 1e-6).sum())) <= len(found) <= most + 1
