"""What a step's routing decisions become in the recorder, and what is left out."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch

from experts.dispatch import step_recorder
from experts.dispatch.layer_shape import LayerShape
from experts.dispatch.step_recorder import StepRecorder
from placement.traces.observation import Observation
from placement.traces.prompts import NewPrompt
from placement.traces.trace import ActivationTrace
from tests.support.small_mesh import random_batch

NUM_LAYERS, NUM_EXPERTS, TOP_K, HIDDEN = 2, 6, 3, 24


def recorded(recorder: StepRecorder) -> ActivationTrace:
    return ActivationTrace.load_npz(io.BytesIO(recorder.to_bytes()))


def test_decisions_are_recorded_step_by_step() -> None:
    shape = LayerShape(NUM_LAYERS, NUM_EXPERTS, TOP_K, HIDDEN, torch.float32)
    recorder = StepRecorder(shape, capacity=100, layers=(1, 3))
    assert recorder.to_bytes() == b""
    steps = []
    for num_tokens in (4, 1, 0, 40):
        steps.append([random_batch(num_tokens, seed=10 * num_tokens + layer).ids_TK for layer in range(NUM_LAYERS)])
        for layer, ids_TK in enumerate(steps[-1]):
            recorder.add(layer, ids_TK.numpy())
    trace = recorded(recorder)
    assert trace.layers == (1, 3)
    np.testing.assert_array_equal(trace.topk_ids, np.concatenate([np.stack(step, 1) for step in steps]))
    np.testing.assert_array_equal(trace.counts.sum(1), 45 * TOP_K)
    recorder.clear()
    assert recorder.to_bytes() == b""
    off = StepRecorder(shape, capacity=0)
    off.add(0, steps[0][0].numpy())
    for use in (off.to_bytes, off.clear):
        with pytest.raises(RuntimeError, match="trace_tokens is 0"):
            use()


def test_padding_and_steps_that_were_broken_off_are_not_recorded() -> None:
    shape = LayerShape(NUM_LAYERS, NUM_EXPERTS, TOP_K, HIDDEN, torch.float32)
    recorder = StepRecorder(shape, capacity=100)
    whole = [random_batch(4, seed=layer).ids_TK.numpy() for layer in range(NUM_LAYERS)]
    recorder.add(0, whole[0])  # a step that ends here
    for layer, ids_TK in enumerate(whole):
        padded_TK = np.full((7, TOP_K), -1)
        padded_TK[:4] = ids_TK
        recorder.add(layer, padded_TK)
    recorder.add(NUM_LAYERS - 1, whole[-1])  # a step whose beginning was before the recorder's
    recorder.add(0, whole[0])
    recorder.add(1, whole[1][:2])  # of another size
    trace = recorded(recorder)
    np.testing.assert_array_equal(trace.topk_ids, np.stack(whole, 1))
    np.testing.assert_array_equal(trace.counts.sum(1), 4 * TOP_K)


def test_nothing_is_observed_before_it_is_asked_for_and_after_it_was_ended() -> None:
    shape = LayerShape(NUM_LAYERS, NUM_EXPERTS, TOP_K, HIDDEN, torch.float32)
    recorder = StepRecorder(shape, capacity=0, observed_tokens=100)
    step = [random_batch(4, seed=layer).ids_TK.numpy() for layer in range(NUM_LAYERS)]

    def run_step(prefill_T: np.ndarray | None = None) -> None:
        recorder.begin_step(prefill_T)
        for layer, ids_TK in enumerate(step):
            recorder.add(layer, ids_TK)

    run_step()
    assert not recorder.wants_phases
    assert recorder.observation(go_on=True) == b""
    assert recorder.wants_phases
    run_step(np.array([True, False, False, True]))
    run_step()
    run_step(np.ones(2, bool))  # of another step: nobody knows
    seen = Observation.from_bytes(recorder.observation(go_on=True))
    assert (seen.steps, seen.tokens_P.tolist()) == (3, [10, 2])
    np.testing.assert_array_equal(seen.sampled[0].topk_ids, np.stack(step, 1))
    np.testing.assert_array_equal(seen.counts_LE.sum(1), 12 * TOP_K)
    run_step()
    assert Observation.from_bytes(recorder.observation(go_on=False)).steps == 1
    run_step()
    assert not recorder.wants_phases
    assert recorder.observation(go_on=True) == b""
    blind = StepRecorder(shape, capacity=0)
    assert blind.observation(go_on=True) == b""
    assert not blind.wants_phases


def test_loads_are_counted_while_somebody_asks_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = LayerShape(NUM_LAYERS, NUM_EXPERTS, TOP_K, HIDDEN, torch.float32)
    now_s = 1000.0
    monkeypatch.setattr(step_recorder.time, "monotonic", lambda: now_s)
    recorder = StepRecorder(shape, capacity=0, layers=(3, 4))
    step = [random_batch(5, seed=layer).ids_TK.numpy() for layer in range(NUM_LAYERS)]
    expected_LE = np.stack([np.bincount(ids_TK.ravel(), minlength=NUM_EXPERTS) for ids_TK in step])

    def run_step() -> None:
        for layer, ids_TK in enumerate(step):
            recorder.add(layer, ids_TK)

    def counts_LE(told: dict[str, Any]) -> np.ndarray:
        return np.frombuffer(told["counts"], "<i8").reshape(NUM_LAYERS, NUM_EXPERTS)

    run_step()
    first = recorder.loads(30.0)
    assert (first["tokens"], first["layers"], first["num_experts"]) == (0, [3, 4], NUM_EXPERTS)
    assert not counts_LE(first).any(), "nothing was counted before it was asked for"
    run_step()
    run_step()
    second = recorder.loads(30.0)
    assert (second["tokens"], second["since"]) == (10, first["since"])
    np.testing.assert_array_equal(counts_LE(second), 2 * expected_LE)
    now_s += 29.0
    run_step()
    np.testing.assert_array_equal(counts_LE(recorder.loads(30.0)), 3 * expected_LE)
    now_s += 31.0
    run_step()
    assert recorder.loads(30.0)["tokens"] == 0, "nobody asked for 30 s, so the count began anew"


def test_distinct_experts_are_counted_of_steps_that_only_generate() -> None:
    shape = LayerShape(NUM_LAYERS, NUM_EXPERTS, TOP_K, HIDDEN, torch.float32)
    recorder = StepRecorder(shape, capacity=0)
    step = [random_batch(5, seed=layer).ids_TK.numpy() for layer in range(NUM_LAYERS)]
    padded = [np.concatenate([ids_TK, np.full_like(ids_TK[:1], -1)]) for ids_TK in step]
    told = recorder.loads(30.0)
    assert (told["steps"], told["rows"], told["activated"]) == (0, 0, 0)
    assert recorder.wants_phases
    for ids, prefill_T in ((step, None), (step, np.array([True, False, False, False, False])), (padded, None)):
        recorder.begin_step(prefill_T)
        for layer, ids_TK in enumerate(ids):
            recorder.add(layer, ids_TK)
    told = recorder.loads(30.0)
    assert (told["steps"], told["rows"]) == (2, 5 + 6)
    assert told["activated"] == 2 * sum(len(np.unique(ids_TK)) for ids_TK in step)


def test_prompts_are_sampled_once_somebody_asks_and_of_their_own_step_alone() -> None:
    shape = LayerShape(NUM_LAYERS, NUM_EXPERTS, TOP_K, HIDDEN, torch.float32)
    recorder = StepRecorder(shape, capacity=0)
    step = [random_batch(12, seed=layer).ids_TK.numpy() for layer in range(NUM_LAYERS)]
    prompts = [NewPrompt([7, 8, 9, 10, 11], 2, 5)]

    def run_step(layers: int = NUM_LAYERS) -> None:
        for layer, ids_TK in enumerate(step[:layers]):
            recorder.add(layer, ids_TK)

    run_step()
    recorder.note_prompts(prompts)
    assert recorder.prompts() == [], "nobody had asked"
    recorder.note_prompts(prompts)
    assert recorder.prompts() == [], "the step was not recorded"
    run_step()
    recorder.note_prompts(prompts)
    run_step(layers=1)
    recorder.note_prompts(prompts)  # of a step that was interrupted
    (found,) = recorder.prompts()
    assert (found.tokens, found.num_experts) == ([7, 8, 9, 10, 11], NUM_EXPERTS)
    np.testing.assert_array_equal(found.ids_RLK, np.stack(step, 1)[2:7])
    assert recorder.prompts() == []


def test_draft_layers_belong_to_the_step_before_where_they_run() -> None:
    """The last layer guesses after a step, of all its rows; a second guess has a row of each request alone."""
    shape = LayerShape(NUM_LAYERS + 1, NUM_EXPERTS, TOP_K, HIDDEN, torch.float32, num_draft_layers=1)
    assert shape.last_of_step == NUM_LAYERS - 1
    recorder, leaves_out = StepRecorder(shape, capacity=100, guesses=True), StepRecorder(shape, capacity=100)
    ids_LTK = [random_batch(5, seed=layer).ids_TK.numpy() for layer in range(NUM_LAYERS + 1)]
    none_TK = np.full((5, TOP_K), -1)
    recorder.prompts(), leaves_out.prompts()
    for each in (recorder, leaves_out):
        for layer in range(NUM_LAYERS):
            each.add(layer, ids_LTK[layer])
        each.note_prompts([NewPrompt([7] * 5, 0, 5)])
    recorder.add(NUM_LAYERS, ids_LTK[-1])
    recorder.add(NUM_LAYERS, ids_LTK[-1][:2])
    np.testing.assert_array_equal(recorded(recorder).topk_ids, np.stack(ids_LTK, 1))
    np.testing.assert_array_equal(recorded(leaves_out).topk_ids, np.stack([*ids_LTK[:-1], none_TK], 1))
    for each in (recorder, leaves_out):
        [sample] = each.prompts()
        assert sample.ids_RLK.shape == (5, NUM_LAYERS, TOP_K), "what a prompt takes is known before anything is guessed"


def test_a_step_after_which_nobody_guessed_is_recorded_with_the_next_one() -> None:
    shape = LayerShape(NUM_LAYERS + 1, NUM_EXPERTS, TOP_K, HIDDEN, torch.float32, num_draft_layers=1)
    recorder = StepRecorder(shape, capacity=0, observed_tokens=100, guesses=True)
    assert recorder.observation(True) == b""
    ids_LTK = [random_batch(5, seed=layer).ids_TK.numpy() for layer in range(NUM_LAYERS + 1)]
    for prefill_T, num_layers in ((np.ones(5, np.bool_), NUM_LAYERS), (None, NUM_LAYERS + 1)):
        recorder.begin_step(prefill_T)
        for layer in range(num_layers):
            recorder.add(layer, ids_LTK[layer])
    seen = Observation.from_bytes(recorder.observation(True))
    assert seen.tokens_P.tolist() == [5, 5], "each step with the rows of prompts that it had"
    assert [(step.topk_ids[:, -1] >= 0).all() for step in seen.sampled] == [False, True]
