"""What routers observe: exact counts, sampled steps evenly spaced, and all of it survives the way to the controller.

P phases, T tokens, L layers, K experts of one, E experts.
"""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.traces.observation import DECODE, PREFILL, Observation, as_trace, merge_observations
from placement.traces.observer import MOST_STEPS, StepObserver
from placement.traces.trace import TraceError

LAYERS, EXPERTS, TOP_K = 2, 300, 3


def step(num_tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1, EXPERTS, (num_tokens, LAYERS, TOP_K)).astype(np.int16)


def counted(ids_TLK: np.ndarray) -> np.ndarray:
    """By brute force, int64 [L, E]."""
    return np.array([[(ids_TLK[:, layer] == e).sum() for e in range(EXPERTS)] for layer in range(LAYERS)])


@settings(max_examples=20)
@given(sizes=st.lists(st.integers(0, 40), max_size=30), sample=st.integers(1, 200), seed=st.integers(0, 99))
def test_counts_are_exact_and_samples_bounded(sizes: list[int], sample: int, seed: int) -> None:
    observer = StepObserver(LAYERS, EXPERTS, TOP_K, sample, step_tokens=16, layers=(3, 7))
    ids = [step(size, seed + number) for number, size in enumerate(sizes)]
    phases = [np.random.default_rng(seed + n).random(size) < 0.3 for n, size in enumerate(sizes)]
    for number, (of_step, prefill_T) in enumerate(zip(ids, phases, strict=True)):
        observer.add(of_step, prefill_T, float(number))
    seen = observer.take()
    everything, prefill_T = np.concatenate([step(0), *ids]), np.concatenate([np.zeros(0, bool), *phases])
    np.testing.assert_array_equal(seen.counts_PLE[PREFILL], counted(everything[prefill_T]))
    np.testing.assert_array_equal(seen.counts_PLE[DECODE], counted(everything[~prefill_T]))
    real_T = (everything >= 0).any((1, 2))
    assert seen.tokens_P.tolist() == [(real_T & ~prefill_T).sum(), (real_T & prefill_T).sum()]
    assert seen.steps == sum((of_step >= 0).any() for of_step in ids)
    assert seen.sampled_tokens <= max(sample, 16)
    assert sum(each.weight for each in seen.sampled) == pytest.approx(seen.steps)
    numbers = [each.number for each in seen.sampled]
    assert len(set(np.diff(numbers))) <= 1, "evenly spaced"
    again = Observation.from_bytes(seen.to_bytes(1))
    np.testing.assert_array_equal(again.counts_PLE, seen.counts_PLE)
    assert (again.layers, again.steps, again.tokens) == ((3, 7), seen.steps, seen.tokens)
    for before, after in zip(seen.sampled, again.sampled, strict=True):
        np.testing.assert_array_equal(before.topk_ids, after.topk_ids)
        np.testing.assert_array_equal(before.prefill_T, after.prefill_T)
        assert (before.number, before.weight, before.num_tokens) == (after.number, after.weight, after.num_tokens)


def test_taking_begins_anew_and_long_stretches_stay_small() -> None:
    observer = StepObserver(LAYERS, EXPERTS, TOP_K, 10**6)
    for number in range(3 * MOST_STEPS):
        observer.add(step(1, number), None, float(number))
    first = observer.take()
    assert first.steps == 3 * MOST_STEPS
    assert MOST_STEPS / 2 < len(first.sampled) <= MOST_STEPS
    assert observer.take().tokens == 0
    observer.add(step(2), None, 0.0)
    assert observer.take().steps == 1
    with pytest.raises(ValueError, match="expert 300 is not one of 300"):
        observer.add(np.full((1, LAYERS, TOP_K), EXPERTS, np.int16), None, 0.0)
    with pytest.raises(ValueError, match="a step must be"):
        observer.add(np.zeros((1, 1, TOP_K), np.int16), None, 0.0)


def observed(*sizes: int, sample: int = 4096) -> Observation:
    observer = StepObserver(LAYERS, EXPERTS, TOP_K, sample, step_tokens=8)
    for number, size in enumerate(sizes):
        observer.add(np.abs(step(size, number)), None, float(number))
    return observer.take()


def test_merged_counts_add_up_and_fade() -> None:
    a, b = observed(4, 4), observed(6)
    merged = merge_observations([a, b], [0.5, 1.0])
    assert merged.tokens == 4 + 6
    assert merged.steps == 3
    assert [each.weight for each in merged.sampled] == [0.5, 0.5, 1.0]
    with pytest.raises(TraceError, match="no observations"):
        merge_observations([])
    with pytest.raises(TraceError, match="2 layers of 300 experts and of 1 layers of 4"):
        merge_observations([a, Observation.nothing((0,), 4)])


def test_a_trace_gives_each_token_of_the_traffic_the_same_weight() -> None:
    """Of 80 tokens of one step 8 are sampled, of another step all 8: the first must make ten elevenths of the trace."""
    seen = observed(80, 8)
    trace = as_trace(seen)
    assert trace.num_tokens == 16
    of_small = {row.tobytes() for row in seen.sampled[1].topk_ids}
    assert sum(row.tobytes() in of_small for row in trace.topk_ids) in (1, 2)
    np.testing.assert_array_equal(trace.counts, seen.counts_LE)
    with pytest.raises(TraceError, match="no traffic"):
        as_trace(Observation.nothing((0, 1), 4))


def test_other_bytes_are_refused() -> None:
    packed = observed(4).to_bytes(1)
    plain = zlib.decompress(packed)
    damaged = [packed[:-5], b"", b"x" * 40, zlib.compress(plain + b"x"), zlib.compress(plain[:-1])]
    damaged.append(zlib.compress(plain.replace(b'"version": 1', b'"version": 2')))
    for each in damaged:
        with pytest.raises(TraceError):
            Observation.from_bytes(each)
