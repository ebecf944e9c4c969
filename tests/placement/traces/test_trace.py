"""Traces: derived loads, files, merging; and the recorder's sample."""

from __future__ import annotations

import io

import numpy as np
import pytest

from placement.traces.importers import import_trace
from placement.traces.recorder import TraceRecorder
from placement.traces.trace import ActivationTrace, TraceError, distinct_rows, merge_traces
from tests.support.made_up_traces import clique_trace


def test_loads_and_coactivation_of_a_worked_example() -> None:
    trace = ActivationTrace(np.array([[[0, 1]], [[1, 1]], [[2, -1]]]), 4)
    assert trace.set_load().tolist() == [[1, 2, 1, 0]]
    together = trace.coactivation(0)
    assert together.diagonal().tolist() == [1, 2, 1, 0]
    assert together[0, 1] == together[1, 0] == 1
    assert together.sum() == 6
    assert distinct_rows(np.array([[3, 3, 0], [-1, 2, -1]])).tolist() == [[0, 3, -1], [2, -1, -1]]


def test_layers_without_picks_are_left_out_of_others_traces_alone(tmp_path) -> None:
    """Dense layers are in those; in this project's it is the layer for guesses, where no router guessed."""
    ids_TLK = np.array([[[0, 1], [-1, -1]], [[1, 2], [-1, -1]]])
    ActivationTrace(ids_TLK, 4, (3, 4)).save(tmp_path / "own.npz")
    np.savez(tmp_path / "olmoe.npz", topk_ids=ids_TLK, num_experts=4, layers=np.array([3, 4]))
    assert import_trace(tmp_path / "own.npz").layers == (3, 4)
    assert import_trace(tmp_path / "olmoe.npz").layers == (3,)


def test_round_trip(tmp_path) -> None:
    trace = ActivationTrace(
        np.array([[[0, 1]], [[1, 2]]]), 4, (7,), np.array([0, 1]), ("a", "b"), np.array([[5, 6, 7, 0]])
    )
    trace.save(tmp_path / "trace.npz")
    again = ActivationTrace.load_npz(tmp_path / "trace.npz")
    for name in ("topk_ids", "counts", "domain"):
        np.testing.assert_array_equal(getattr(again, name), getattr(trace, name))
    assert (again.layers, again.domains, again.num_experts) == ((7,), ("a", "b"), 4)
    assert ActivationTrace.load_npz(io.BytesIO(trace.to_bytes())).num_tokens == 2
    assert trace.of_domain("b").topk_ids.tolist() == [[[1, 2]]]


@pytest.mark.parametrize(
    ("ids", "arguments", "message"),
    [
        (np.zeros((2, 2)), {}, "topk_ids must be integers"),
        (np.full((1, 1, 1), 4), {}, "token 0, layer 0: expert 4 is not one of 4"),
        (np.zeros((0, 1, 1), int), {}, "the trace is empty"),
        (np.zeros((1, 1, 1), int), {"counts": np.zeros((2, 4))}, "counts must be"),
        (np.zeros((1, 1, 1), int), {"counts": np.full((1, 4), np.nan)}, "layer 0: the count of expert 0 is nan"),
        (np.zeros((1, 1, 1), int), {"counts": np.full((1, 4), 0.3)}, "expected a whole number"),
        (np.zeros((1, 1, 1), int), {"counts": np.full((1, 4), 2**62)}, "expected a whole number from 0 to"),
        (np.zeros((1, 1, 1), int), {"counts": np.full((1, 4), "a")}, "counts must be numbers"),
        (np.zeros((1, 2, 1), int), {"layers": (4, 4)}, "expected each once"),
        (np.zeros((1, 1, 1), int), {"layers": ([1],)}, "a layer is"),
        (np.zeros((1, 1, 1), int), {"domain": np.array([256]), "domains": ("a",)}, "domain must be"),
        (np.zeros((1, 1, 1), int), {"domain": np.array([0.6]), "domains": ("a",)}, "domain must be"),
        (np.zeros((1, 1, 1), int), {"layers": (1, 2)}, "1 layers, 2 are named"),
        (np.zeros((1, 1, 1), int), {"domain": np.array([3]), "domains": ("a",)}, "domain must be"),
    ],
)
def test_bad_traces_are_refused(ids, arguments, message) -> None:
    with pytest.raises(TraceError, match=message):
        ActivationTrace(ids, 4, **arguments)


def test_load_takes_counts_where_they_are_of_the_same_tokens() -> None:
    trace = clique_trace(num_tokens=300, num_layers=1)
    same = ActivationTrace(trace.topk_ids, 16, counts=trace.set_load() * 50)
    other = ActivationTrace(trace.topk_ids, 16, counts=trace.set_load()[:, ::-1] ** 3 + 1)
    np.testing.assert_allclose(same.load(), trace.set_load())
    np.testing.assert_allclose(other.load(), trace.set_load())
    assert not np.allclose(other.load("counts"), trace.set_load())
    assert other.load("counts").sum() == pytest.approx(trace.set_load().sum())
    with pytest.raises(TraceError, match="holds no counts"):
        trace.load("counts")


def test_merging_weighs_routers_by_what_they_saw() -> None:
    busy = ActivationTrace(np.zeros((100, 1, 1), int), 2, counts=np.array([[9000, 0]]))
    idle = ActivationTrace(np.ones((100, 1, 1), int), 2, counts=np.array([[0, 1000]]))
    merged = merge_traces([busy, idle])
    assert merged.counts is not None
    assert merged.counts.tolist() == [[9000, 1000]]
    assert merged.set_load().tolist() == [[100, 11]]
    assert merge_traces([busy, idle], max_tokens=50).num_tokens == 50
    with pytest.raises(TraceError, match="traces differ in num_experts: 2 and 3"):
        merge_traces([busy, ActivationTrace(np.zeros((1, 1, 1), int), 3)])
    with pytest.raises(TraceError, match="no traces"):
        merge_traces([])


def recorded(stream, capacity, half_life=None, batch=7, seed=0) -> ActivationTrace:
    recorder = TraceRecorder(1, 64, 1, capacity, half_life, seed)
    for start in range(0, len(stream), batch):
        recorder.add(stream[start : start + batch])
    return recorder.snapshot()


def test_a_short_stream_is_kept_whole() -> None:
    stream = np.arange(20).reshape(20, 1, 1) % 64
    trace = recorded(stream, capacity=50)
    np.testing.assert_array_equal(np.sort(trace.topk_ids.ravel()), np.arange(20))
    assert trace.counts is not None
    assert trace.counts.sum() == 20


def test_the_sample_is_uniform() -> None:
    """Every tenth of a stream should hold a tenth of the sample: 4,000 places, so 400 +- 19 each."""
    stream = np.repeat(np.arange(10), 2000).reshape(-1, 1, 1)
    sample = np.concatenate([recorded(stream, 400, seed=seed).topk_ids.ravel() for seed in range(10)])
    assert np.abs(np.bincount(sample, minlength=10) - 400).max() < 5 * 19


def test_old_tokens_fade() -> None:
    stream = np.repeat([0, 1], 4000).reshape(-1, 1, 1)
    trace = recorded(stream, 500, half_life=2000, seed=1)
    # Expert 0 ended two half-lives ago: a quarter of the sample, 500 * 0.25 +- 10, and of the counts alike.
    assert np.bincount(trace.topk_ids.ravel())[0] == pytest.approx(125, abs=50)
    assert trace.counts is not None
    assert trace.counts[0, 0] / trace.counts.sum() == pytest.approx(0.25, abs=0.02)


def test_recorder_takes_empty_batches_and_refuses_what_does_not_fit() -> None:
    recorder = TraceRecorder(2, 8, 2, 10)
    recorder.add(np.zeros((0, 2, 2), int))
    with pytest.raises(TraceError, match="empty"):
        recorder.snapshot()
    with pytest.raises(ValueError, match=r"a batch must be \[tokens, 2, 2\]"):
        recorder.add(np.zeros((3, 1, 2), int))
    with pytest.raises(ValueError, match="expert 8 is not one of 8"):
        recorder.add(np.full((1, 2, 2), 8))
    recorder.add(np.array([[[1, -1], [2, 3]], [[-1, -1], [-1, -1]]]))  # the second is padding
    assert recorder.tokens_seen == 1
    counts = recorder.snapshot().counts
    assert counts is not None
    assert counts.tolist() == [[0, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0]]
    recorder.clear()
    with pytest.raises(TraceError, match="empty"):
        recorder.snapshot()
