"""Steps against the plain rule with a router's memory, and which steps are drawn (T tokens, K experts, S steps)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from placement.placement import Placement
from placement.rule.evaluate import evaluate
from placement.rule.steps import PREFILL_TOKENS, count_steps, draw_steps, evaluate_steps
from placement.traces.trace import ActivationTrace
from tests.support.plain_rule import plain_rule


def routing(num_tokens: int, seed: int = 0) -> ActivationTrace:
    """Two layers of 12 experts, 3 a token, some of them popular."""
    rng = np.random.default_rng(seed)
    score = rng.gumbel(size=(num_tokens, 2, 12)) + np.linspace(0, 2, 12)
    return ActivationTrace(np.argsort(score, axis=2)[:, :, -3:].astype(np.int16), 12)


def replicated(speeds: tuple[float, ...] | None = None) -> Placement:
    """Four ranks on two nodes, 12 experts in order and a second replica of each, two ranks on."""
    row = np.concatenate([[3 * r, 3 * r + 1, 3 * r + 2, *(np.arange(3) + 3 * ((r + 2) % 4))] for r in range(4)])
    return Placement(4, 2, 12, np.tile(row, (2, 1)), speeds=speeds)


@pytest.mark.parametrize("speeds", [None, (1.0, 0.5, 1.0, 1.0)], ids=str)
def test_each_step_follows_the_ones_before_it(speeds: tuple[float, ...] | None) -> None:
    placement, trace = replicated(speeds), routing(60)
    ids_STK = trace.ids_of_layer(1)[draw_steps(60, 20)]
    found = count_steps(placement, 1, ids_STK)
    load_R = np.zeros(4, np.int64)
    for step, ids_TK in enumerate(ids_STK):
        rank_TK, load_R = plain_rule(ids_TK, placement.slots_LER[1], 2, load_R >> 1, placement.work_R)
        assert found.pairs_SR[step].tolist() == [(rank_TK == rank).sum() for rank in range(4)]
        assert found.rows_SR[step].tolist() == [(rank_TK == rank).any(1).sum() for rank in range(4)]
        assert found.activated_SR[step].tolist() == [len(set(ids_TK[rank_TK == rank])) for rank in range(4)]


def test_figures_are_means_after_the_first_step_by_speed() -> None:
    placement, trace = replicated((1.0, 0.5, 1.0, 2.0)), routing(70)
    (figures,) = evaluate_steps(placement, trace, (20,))
    assert (figures.tokens, figures.num_steps, figures.phase) == (20, 2, "decode")
    for layer in range(2):
        counts = count_steps(placement, layer, trace.ids_of_layer(layer)[draw_steps(70, 20)])
        slowest_S = (counts.pairs_SR / [1.0, 0.5, 1.0, 2.0]).max(1)
        assert figures.balancedness[layer] == pytest.approx((counts.pairs_SR.sum(1) / 4.5 / slowest_S)[1:].mean())
        assert figures.fan_out[layer] == counts.rows_SR[1:].sum() / 40
        # The fastest rank has speed 2: one of speed 0.5 reads one expert while it reads four.
        assert figures.busiest_activated[layer] == (counts.activated_SR[1:] * [2.0, 4.0, 2.0, 1.0]).max(1).mean()
        assert figures.activated[layer] == counts.activated_SR[1:].sum(1).mean()


def test_routers_that_prefer_local_replicas_choose_apart() -> None:
    placement = Placement(2, 2, 2, np.array([[0, 1, 0, 1]]))  # everything on both nodes
    counts = count_steps(placement, 0, np.array([[[0, 1], [0, 1], [1, -1]]], np.int32), prefer_local_replicas=True)
    assert counts.pairs_SR.tolist() == [[3, 2]]
    assert counts.rows_SR.tolist() == [[2, 1]]


def test_steps_are_drawn_from_all_of_the_trace_and_prompts_are_neighbours() -> None:
    at_ST = draw_steps(100, 30)
    assert at_ST.shape == (3, 30)
    assert len(np.unique(at_ST)) == 90
    assert not (np.diff(at_ST, axis=1) == 1).all()
    prompts_ST = draw_steps(3 * PREFILL_TOKENS + 5, PREFILL_TOKENS)
    assert prompts_ST[:, 0].tolist()[0] == 0
    assert prompts_ST[-1, -1] == 3 * PREFILL_TOKENS + 4
    assert (np.diff(prompts_ST, axis=1) == 1).all()
    assert draw_steps(10**6, 1).shape == (32, 1)
    assert draw_steps(29, 30).shape == (0, 30)


def test_evaluate_tells_of_steps_and_a_trace_has_more_of_them_than_one() -> None:
    trace = routing(320)
    found = evaluate(replicated(), trace)
    assert [each.tokens for each in found.steps] == [32, 256]
    summary = found.summary()
    assert summary["balancedness_32"] == found.steps[0].balancedness.mean()
    assert summary["fan_out_256"] == found.steps[1].fan_out.mean()
    assert found.steps[1].num_steps == 1  # the only step is not spent on warming up
    assert summary["balancedness_32"] < summary["balancedness"]
    counts_alone = ActivationTrace(np.zeros((0, 2, 1), np.int16), 12, counts=np.ones((2, 12)))
    assert evaluate(replicated(), counts_alone).steps == ()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"steps of \[0\] tokens"):
        evaluate_steps(replicated(), routing(4), (0,))
    with pytest.raises(ValueError, match="the placement is for 2 layers of 12 experts"):
        evaluate_steps(Placement.linear(2, 12, 4), replace(routing(4), num_experts=13))
