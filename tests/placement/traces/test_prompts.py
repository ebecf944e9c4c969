"""Samples of prompts: bounded in number, rows and tokens, whatever comes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from placement.traces.prompts import EDGE_TOKENS, LEAST_ROWS, MOST_PROMPTS, MOST_ROWS, NewPrompt, PromptSample
from placement.traces.prompts import PromptSamples as Samples

LAYERS, TOP_K = 2, 2


def step_of(rows: int) -> np.ndarray:
    """int64 [T, L, K]; each row's ids say which row it is."""
    return np.arange(rows)[:, None, None] + np.zeros((1, LAYERS, TOP_K), np.int64)


@given(st.lists(st.integers(1, 90), max_size=12), st.integers(0, 90))
def test_rows_are_evenly_spaced_and_a_prompts_own(lengths: list[int], cut_off: int) -> None:
    starts = np.cumsum([0, *lengths]).tolist()
    samples = Samples(num_experts=999)
    rows = max(starts[-1] - cut_off, 0)  # a step that lost its end: whose rows are missing is left out
    prompts = [NewPrompt(range(length), start, length) for start, length in zip(starts, lengths, strict=False)]
    samples.add(step_of(rows), prompts)
    whole = [each for each in prompts if each.num_rows >= LEAST_ROWS and each.first_row + each.num_rows <= rows]
    found = samples.take()
    assert len(found) == len(whole)
    for sample, prompt in zip(found, whole, strict=True):
        assert sample.tokens == list(prompt.tokens)
        rows_R = sample.ids_RLK[:, 0, 0]
        assert (sample.ids_RLK == rows_R[:, None, None]).all()
        assert len(rows_R) == min(prompt.num_rows, MOST_ROWS)
        assert rows_R[0] == prompt.first_row
        assert rows_R[-1] < prompt.first_row + prompt.num_rows
        gaps = np.diff(rows_R)
        assert gaps.min() >= 1
        assert gaps.max() - gaps.min() <= 1
        back = PromptSample.from_dict(sample.to_dict())
        assert (back.tokens, back.num_experts) == (sample.tokens, 999)
        np.testing.assert_array_equal(back.ids_RLK, sample.ids_RLK)
    assert samples.take() == []


def test_the_newest_prompts_stay_and_of_long_ones_both_ends() -> None:
    samples = Samples(num_experts=8)
    long = list(range(10_000))
    for number in range(MOST_PROMPTS + 3):
        samples.add(step_of(LEAST_ROWS), [NewPrompt([number, *long], 0, LEAST_ROWS)])
    found = samples.take()
    assert [sample.tokens[0] for sample in found] == list(range(3, MOST_PROMPTS + 3))
    assert found[0].tokens[1:EDGE_TOKENS] == long[: EDGE_TOKENS - 1]
    assert found[0].tokens[EDGE_TOKENS:] == long[-EDGE_TOKENS:]
