"""Planning from a placement in use: never worse than it, and no copy that saves less than its price."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from placement.placement import Placement
from placement.rule.evaluate import evaluate
from placement.search.few_copies.resize import copies_between
from placement.search.optimizer import optimize
from placement.search.problem import PlanRequest
from placement.traces.trace import ActivationTrace
from tests.support.made_up_traces import clique_trace

LOOSE = 3.0  # load cap: visits and copies alone decide
SMALL = 0.01


def random_trace(seed: int, num_experts: int = 12) -> ActivationTrace:
    rng = np.random.default_rng(seed)
    return ActivationTrace(np.stack([[rng.permutation(num_experts)[:3]] for _ in range(120)]), num_experts)


def cost(placement: Placement, in_use: Placement, trace: ActivationTrace, price: float) -> float:
    """Visits a token, with copies at their price."""
    return float(evaluate(placement, trace).fan_out.sum()) + price * copies_between(in_use, placement)


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 1000), slots=st.integers(3, 5), price=st.sampled_from([0.0, 0.02, 0.2]))
def test_no_plan_costs_more_than_the_one_in_use(seed: int, slots: int, price: float) -> None:
    trace, before = random_trace(seed), random_trace(seed + 1)
    request = PlanRequest(4, 1, slots, load_cap=LOOSE, copy_price=price, effort=SMALL)
    in_use = optimize(before, request).placement
    found = optimize(trace, request, in_use).placement
    assert cost(found, in_use, trace, price) <= cost(in_use, in_use, trace, price) + 1e-9


@pytest.mark.parametrize("slots", [4, 5])
def test_fewer_copies_than_a_plan_from_scratch(slots: int) -> None:
    request = PlanRequest(4, 1, slots, load_cap=1.5, effort=SMALL)
    in_use = optimize(clique_trace(seed=1), request).placement
    trace = clique_trace(seed=2, purity=0.7)
    fresh = optimize(trace, request).placement
    near = optimize(trace, request, in_use).placement
    assert copies_between(in_use, near) < copies_between(in_use, fresh)
    assert evaluate(near, trace).fan_out.mean() <= 1.1 * evaluate(fresh, trace).fan_out.mean()


def test_a_price_above_all_savings_leaves_everything_where_it_is() -> None:
    trace = clique_trace()
    in_use = Placement.linear(2, 16, 4)
    # A token visits at most four ranks, so no copy can save more than four visits of each.
    request = PlanRequest(4, 1, 4, load_cap=LOOSE, copy_price=4.0, effort=SMALL)
    assert copies_between(in_use, optimize(trace, request, in_use).placement) == 0
    assert copies_between(in_use, optimize(trace, replace(request, copy_price=0.0), in_use).placement) > 0


@pytest.mark.parametrize("gone", [0, 3])
def test_a_drained_rank_costs_little_more_than_what_it_alone_holds(gone: int) -> None:
    trace = clique_trace()
    in_use = optimize(trace, PlanRequest(4, 1, 6, load_cap=LOOSE, effort=0.05)).placement
    held_LER = in_use.slots_LER >= 0
    unavoidable = int((held_LER[:, :, gone] & (held_LER.sum(2) == 1)).sum())
    slots = tuple(0 if rank == gone else 6 for rank in range(4))
    request = PlanRequest(4, 1, slots, load_cap=LOOSE, effort=0.05)
    fresh = optimize(trace, request).placement
    dear = optimize(trace, replace(request, copy_price=4.0), in_use).placement
    assert (dear.experts_of_rank(gone) < 0).all()
    assert copies_between(in_use, dear) == unavoidable
    near = optimize(trace, request, in_use).placement
    assert copies_between(in_use, near) < copies_between(in_use, fresh)
    assert cost(near, in_use, trace, request.copy_price) <= cost(fresh, in_use, trace, request.copy_price)


def test_ranks_may_be_added() -> None:
    trace = clique_trace()
    in_use = Placement.linear(2, 16, 4)
    request = PlanRequest(8, 1, 4, load_cap=1.5, effort=SMALL)
    fresh, found = optimize(trace, request).placement, optimize(trace, request, in_use).placement
    assert found.num_ranks == 8
    assert (evaluate(found, trace).balancedness > 0.5).all()
    assert cost(found, in_use, trace, request.copy_price) <= cost(fresh, in_use, trace, request.copy_price)
