"""Whether a layer's slots beat others: loads of single steps as routers make them, and what is saved for certain."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from placement.placement import Placement
from placement.rule.steps import count_steps, draw_steps
from placement.search.judgement import NO_GAIN, Gain, worst_in_steps
from placement.search.problem import LayerProblem


def problem_of(placement: Placement, num_tokens: int, seed: int = 0) -> LayerProblem:
    rng = np.random.default_rng(seed)
    score = rng.gumbel(size=(num_tokens, placement.num_experts)) + np.linspace(0, 1, placement.num_experts)
    ids_TK = np.argpartition(-score, 3, axis=1)[:, :3].astype(np.int32)
    load_E = np.bincount(ids_TK.ravel(), minlength=placement.num_experts).astype(float)
    target_R = np.maximum(load_E.sum() * placement.speed_R / placement.speed_R.sum(), 1e-9)
    return LayerProblem(
        ids=ids_TK,
        load=load_E,
        pair_weight=np.ones(placement.num_experts),
        open_slots=np.full(placement.num_ranks, placement.slots_per_rank),
        node_of_rank=placement.node_of_rank_R,
        num_nodes=placement.num_nodes,
        node_weight=4.0,
        min_replicas=1,
        max_filled=placement.num_slots,
        target=target_R,
        allowed=target_R * 1.05,
        load_cap=1.05,
        speeds=placement.speeds,
    )


@pytest.mark.parametrize("speeds", [None, (1.0, 1.0, 0.5, 2.0)])
@pytest.mark.parametrize("num_nodes", [1, 2])
def test_steps_are_loaded_as_they_are_evaluated(num_nodes, speeds) -> None:
    placement = replace(Placement.linear(1, 12, 4, num_nodes, 2), speeds=speeds)
    problem = problem_of(placement, 600)
    expected = []
    for tokens in (32, 256):
        counts = count_steps(placement, 0, problem.ids[draw_steps(600, tokens)])
        expected.append((1 / counts.balancedness_S(placement.speed_R)).mean())
    slots_Rs = placement.physical_to_logical_map.reshape(4, -1).astype(np.int32)
    assert worst_in_steps(problem, slots_Rs) == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("num_tokens", [0, 31])
def test_too_few_tokens_for_a_step_say_nothing(num_tokens) -> None:
    placement = Placement.linear(1, 12, 4)
    problem = problem_of(placement, num_tokens)
    assert worst_in_steps(problem, placement.physical_to_logical_map.reshape(4, -1).astype(np.int32)) == 0


def test_what_steps_lose_comes_off_what_is_certain() -> None:
    gain = Gain(visits=0.2, visits_error=0.02, load=0.0, load_error=0.7, excess=0.0)
    assert gain.least(2, 3) == pytest.approx(0.16)
    dearer = gain._replace(steps=-0.3)
    assert dearer.saved == pytest.approx(-0.1)
    assert dearer.least(2, 3) == pytest.approx(-0.14)
    assert NO_GAIN.least(2, 3) == NO_GAIN.saved == 0


def test_load_above_the_cap_is_repaired_though_visits_are_unsure() -> None:
    gain = Gain(visits=-0.1, visits_error=0.1, load=4.0, load_error=0.7, excess=4.5)
    assert gain.least(2, 3) == pytest.approx(4.5 - 3 * 0.7 - 0.1)
