"""Domains' caps: what holds for all of the traffic holds for each of its domains, as far as slots allow."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from placement.placement import Placement
from placement.rule.evaluate import evaluate
from placement.search.optimizer import optimize
from placement.search.problem import MOST_DOMAIN_EXCESS, PlanRequest
from placement.traces.trace import ActivationTrace
from tests.support.made_up_traces import clique_trace

SMALL = 0.01  # effort: enough for sixteen experts


def two_domains() -> ActivationTrace:
    """Sixteen experts in eight pairs that go together and are used alike; a domain wants half of the pairs."""
    pair_T = np.arange(2000) % 8
    domain_T = pair_T // 4
    ids = np.stack([2 * pair_T, 2 * pair_T + 1], axis=1)[:, None]
    return ActivationTrace(ids, 16, domain=domain_T.astype(np.int8), domains=("code", "prose"))


def test_no_domain_stands_on_half_of_the_ranks() -> None:
    """Linear order gives each domain two of four ranks: fan-out 1 either way, but half of them idle."""
    trace = two_domains()
    linear = Placement.linear(1, 16, 4)
    assert evaluate(linear, trace.of_domain("code")).balancedness[0] < 0.55
    found = optimize(trace, PlanRequest(4, 1, 4, effort=SMALL))
    assert found.fan_out[0] == 1
    for name in trace.domains:
        assert evaluate(found.placement, trace.of_domain(name)).balancedness[0] == pytest.approx(1)


def test_a_trace_without_domains_is_planned_as_one_mix() -> None:
    """One domain is all of the traffic: its plan is that of a trace that names none."""
    trace = clique_trace()
    for slots in (4, 5):
        request = PlanRequest(4, 1, slots, effort=SMALL)
        plain = optimize(trace, request).placement
        one = replace(trace, domain=np.zeros(trace.num_tokens, np.int8), domains=("all",))
        assert optimize(one, request).placement == plain


def test_balance_alone_asks_for_no_domains() -> None:
    trace = two_domains()
    request = PlanRequest(4, 1, 4, objective="balance", effort=SMALL)
    plain = ActivationTrace(trace.topk_ids, 16)
    assert optimize(trace, request).placement == optimize(plain, request).placement


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 1000), num_domains=st.integers(2, 4), cap=st.sampled_from([1.02, 1.05, 1.2]))
def test_caps_hold_where_any_placement_reaches_them(seed: int, num_domains: int, cap: float) -> None:
    """Eight experts on two ranks: all 35 placements are known, and how far each is above its caps."""
    rng = np.random.default_rng(seed)
    domain_T = np.concatenate([np.arange(num_domains), rng.integers(0, num_domains, 300)])
    taste_DE = rng.lognormal(0, 0.6, (num_domains, 8))
    ids_TK = np.stack([rng.choice(8, 2, replace=False, p=taste_DE[d] / taste_DE[d].sum()) for d in domain_T])
    names = tuple(f"domain {d}" for d in range(num_domains))
    trace = ActivationTrace(ids_TK[:, None], 8, domain=domain_T.astype(np.int8), domains=names)
    load_ME = np.stack([np.bincount(ids_TK[domain_T == d].ravel(), minlength=8) for d in range(num_domains)])
    load_ME = np.concatenate([load_ME.sum(0, keepdims=True), load_ME]).astype(float)
    load_ME /= load_ME.sum(1, keepdims=True) / 2
    cap_M = np.array([cap, *[1 + min((cap - 1) * num_domains, MOST_DOMAIN_EXCESS)] * num_domains])

    def above(experts: np.ndarray) -> float:
        first_M = load_ME[:, experts].sum(1)
        return float((np.maximum(first_M, 2 - first_M) / cap_M).max())

    reachable = min(above(np.array([0, *rest])) for rest in combinations(range(1, 8), 3))
    found = optimize(trace, PlanRequest(2, 1, 4, load_cap=cap, effort=SMALL)).placement
    assert above(found.experts_of_rank(0)[0]) <= max(1.0, reachable) + 1e-9
