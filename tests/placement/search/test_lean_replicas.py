"""Slots that are not filled for the sake of it: replicas that slow steps down are left out, within the caps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from placement.capacity.hardware import Constants, ModelShape
from placement.capacity.replica_worth import Worth, layer_seconds
from placement.rule.evaluate import evaluate
from placement.search.lean_replicas import filled_that_pays, lean_replicas
from placement.search.optimizer import optimize
from placement.search.problem import PlanRequest
from placement.traces.trace import ActivationTrace
from tests.support.made_up_traces import clique_trace

SMALL = 0.02
MODEL = ModelShape(hidden_size=10, intermediate_size=4, weight_bytes=1.0, activation_bytes=1e-9)  # 120 B, 240 flops
READS = Worth(MODEL, Constants(1e3, 1e12, 0.0, 0.0, 0.0), step_tokens=(8, 32))  # reading weights takes all the time
COMPUTES = Worth(MODEL, Constants(1e15, 1e3, 0.0, 0.0, 0.0), step_tokens=(64, 256))  # computing does


def hot_trace() -> ActivationTrace:
    """Half of the pairs want expert 0: only with replicas of it are four ranks even."""
    rng = np.random.default_rng(0)
    ids = np.stack([np.zeros(600, int), rng.integers(1, 16, 600)], axis=1)
    return ActivationTrace(ids[:, None], 16)


def replicas(placement: object) -> int:
    return int((placement.logical_replica_count - 1).sum())  # type: ignore[attr-defined]


def test_small_steps_get_fewer_replicas_than_large_ones() -> None:
    """More slots make small steps slower and large ones faster, unless the slots stay empty where that is so."""
    trace = hot_trace()
    request = PlanRequest(4, 1, 6, load_cap=4.0, effort=SMALL)
    full, bare = optimize(trace, request).placement, optimize(trace, replace(request, slots_per_rank=4)).placement
    lean = optimize(trace, replace(request, worth=READS)).placement
    rich = optimize(trace, replace(request, worth=COMPUTES, load_cap=1.1)).placement
    assert replicas(lean) < replicas(full)
    assert replicas(rich) >= 3
    assert layer_seconds(full, trace, 0, READS).mean() > layer_seconds(bare, trace, 0, READS).mean()
    assert layer_seconds(lean, trace, 0, READS).mean() <= layer_seconds(bare, trace, 0, READS).mean() * 1.02
    assert layer_seconds(full, trace, 0, COMPUTES).mean() < layer_seconds(bare, trace, 0, COMPUTES).mean()
    assert layer_seconds(rich, trace, 0, COMPUTES).mean() < layer_seconds(bare, trace, 0, COMPUTES).mean()


def test_the_cap_keeps_replicas_that_steps_would_do_without() -> None:
    trace = hot_trace()
    request = PlanRequest(4, 1, 6, load_cap=1.1, worth=READS, effort=SMALL)
    found = optimize(trace, request)
    assert (found.balancedness >= 1 / 1.1 - 1e-9).all()
    assert found.placement.logical_replica_count[0, 0] > 1
    np.testing.assert_allclose(found.balancedness, evaluate(found.placement, trace).balancedness)
    np.testing.assert_allclose(found.fan_out, evaluate(found.placement, trace).fan_out)


@pytest.mark.parametrize(("nodes", "least"), [(1, 2), (2, 2)])
def test_promised_replicas_stay_apart(nodes: int, least: int) -> None:
    trace = clique_trace(num_layers=1)
    request = PlanRequest(4, nodes, 10, min_replicas=least, load_cap=3.0, worth=READS, effort=SMALL)
    holds_ER = optimize(trace, request).placement.slots_LER[0] >= 0
    on_ED = holds_ER if nodes == 1 else holds_ER.reshape(16, nodes, -1).any(2)
    assert (on_ED.sum(1) >= least).all()


def test_what_steps_cannot_judge_is_filled() -> None:
    """A trace with fewer tokens than a step says nothing of it, one of counts nothing at all."""
    trace = clique_trace(num_layers=1, num_tokens=50)
    request = PlanRequest(4, 1, 5, load_cap=3.0, effort=SMALL)
    large = replace(READS, step_tokens=(64,))

    def no_plan(filled: int) -> np.ndarray:
        raise AssertionError(f"{filled} slots were tried")

    assert filled_that_pays(no_plan, trace, 0, request, large, 20) == (20, 0)
    full = optimize(trace, request).placement
    assert optimize(trace, replace(request, worth=large)).placement == full
    assert lean_replicas(full, trace, request, large, lambda: False) == full
    counts = ActivationTrace(np.zeros((0, 1, 1), np.int16), 16, counts=np.arange(1, 17)[None])
    assert replicas(optimize(counts, replace(request, worth=READS)).placement) == 4
