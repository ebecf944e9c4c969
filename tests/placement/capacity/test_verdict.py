"""The cost of a step: against sums by hand, against a slow definition, and the direction of every term."""

from __future__ import annotations

import numpy as np
import pytest

from placement.capacity.verdict import H100, Constants, ModelShape, compare_with_engine, explain_cost, step_cost
from placement.placement import Placement
from placement.topology import Link, Links, Topology
from placement.traces.trace import ActivationTrace, TraceError

MODEL = ModelShape(hidden_size=10, intermediate_size=4, weight_bytes=1.0, activation_bytes=1.0)  # 120 B, 240 flops
UNIT = Constants(memory_bytes_per_s=1.0, flops_per_s=1e6, call_s=3.0, router_s=5.0, router_token_s=0.5)
LINKS = Links(node=Link(bandwidth_bytes_per_s=2.0, latency_s=0.25), rack=Link(bandwidth_bytes_per_s=1.0, latency_s=0.5))


def trace_of(rows, num_experts, counts=None):
    return ActivationTrace(np.array(rows, np.int16), num_experts, counts=counts)


def random_trace(seed=0, tokens=400, layers=2, num_experts=16, k=4):
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.gumbel(size=(tokens, layers, num_experts)) + np.linspace(0, 2, num_experts), axis=2)[:, :, -k:]
    return ActivationTrace(ids.astype(np.int16), num_experts)


def test_by_hand():
    # Two ranks on two nodes: rank 0 holds experts 0, 1, rank 1 holds 2, 3. One token wants 0 and 1, the other 1 and 2.
    trace = trace_of([[[0, 1]], [[1, 2]]], 4)
    placement = Placement(2, 2, 4, np.array([[0, 1, 2, 3]]))
    topology = Topology.uniform(2, 2, links=LINKS)
    cost = step_cost(
        trace, placement, model=MODEL, constants=UNIT, topology=topology, tokens=2, router_nodes=[0], batches=1
    )
    # Rank 0 gets 2 rows with 3 pairs over its node's link, rank 1 gets 1 row with 1 pair over the rack's.
    assert cost.link_bytes == {"node": 2 * 10 + 3 * 8 + 2 * 10, "rack": 10 + 8 + 10}
    assert cost.link_s == {"node": 44 / 2 + 0.25 + 20 / 2 + 0.25, "rack": 18 + 0.5 + 10 + 0.5}
    assert cost.wire_s.tolist() == [max(22.25, 18.5) + max(10.25, 10.5)]
    assert cost.router_s.tolist() == [5.0 + 2 * 0.5]
    assert cost.shard_s.tolist() == [2 * 120 + 3.0]
    assert (cost.fan_out, cost.node_fan_out, cost.activated) == (1.5, 1.5, 3.0)
    assert cost.step_s == pytest.approx(6 + 32.75 + 243)


def test_near_replicas_first_cross_no_link_that_they_need_not():
    # Every expert stands on both nodes: each router finds its token's at home.
    trace = trace_of([[[0, 1]], [[0, 1]]], 2)
    placement = Placement(2, 2, 2, np.array([[0, 1, 0, 1]]))
    cost = step_cost(trace, placement, model=MODEL, constants=UNIT, topology=Topology.uniform(2, 2, links=LINKS),
                     tokens=2, batches=1, prefer_local_replicas=True)  # fmt: skip
    assert cost.link_bytes == {"node": 2 * (10 + 2 * 8 + 10)}


def test_two_routers_share_the_tokens_and_speed_divides():
    trace = trace_of([[[0]], [[1]]], 2)
    placement = Placement(2, 2, 2, np.array([[0, 1]]))
    topology = Topology(np.array([0, 1]), np.array([0, 0]), np.ones(2), np.array([1.0, 0.5]), LINKS)
    cost = step_cost(trace, placement, model=MODEL, constants=UNIT, topology=topology, tokens=2, batches=4)
    assert cost.router_s.tolist() == [5.5]
    assert cost.shard_s.tolist() == [240 + 3.0]  # the slow shard reads its one expert in twice the time
    assert cost.weights_s.tolist() == [240.0]


def test_terms_add_up_and_name_what_decides():
    trace = random_trace()
    placement = Placement.linear(2, 16, 4, 2)
    rng = np.random.default_rng(1)
    current = Placement(4, 2, 16, np.array([rng.permutation(16) for _ in range(2)]))
    terms = explain_cost(trace, placement, tokens=32, current=current)
    named = {term.term: term for term in terms}
    assert terms[-1].term == "step"
    parts = [term.seconds for term in terms[:-1] if not term.term.startswith(" ")]
    assert sum(parts) == pytest.approx(terms[-1].seconds)
    assert {"router", "wire", "  link node", "  link rack", "slowest shard", "  weights read", "migration"} <= set(
        named
    )
    assert "node fan-out" in named["wire"].how
    assert all(term.seconds >= 0 and term.how for term in terms)


def test_deterministic_for_a_seed():
    trace, placement = random_trace(), Placement.linear(2, 16, 4)
    assert explain_cost(trace, placement, seed=3) == explain_cost(trace, placement, seed=3)


def test_bytes_follow_from_fan_out():
    trace = random_trace()
    for seed in range(3):
        rng = np.random.default_rng(seed)
        placement = Placement(4, 1, 16, np.array([rng.permutation(16) for _ in range(2)]))
        cost = step_cost(trace, placement, model=MODEL, tokens=50)
        assert sum(cost.link_bytes.values()) == pytest.approx(2 * 50 * (2 * 10 * cost.fan_out + 8 * 4))


def test_fewer_visits_cost_less_wire_and_hot_shards_cost_more():
    # Tokens want experts in pairs (0,1), (2,3), ...: together they cost one visit, apart two.
    rows = [[[2 * n, 2 * n + 1]] for n in range(4)] * 8
    together, apart = (Placement(4, 2, 8, np.array([row])) for row in (range(8), [0, 4, 1, 5, 2, 6, 3, 7]))
    trace = trace_of(rows, 8)
    near, far = (step_cost(trace, each, tokens=32) for each in (together, apart))
    assert near.fan_out == 1
    assert far.fan_out == 2
    assert near.wire_s[0] < far.wire_s[0]
    skewed = trace_of([[[0, 1]]] * 30 + [[[2, 3]]] * 2, 8)
    slow = Constants(1e12, 1e3, 0.0, 0.0, 0.0)
    even = step_cost(trace, together, constants=slow, tokens=32)
    hot = step_cost(skewed, together, constants=slow, tokens=32)
    assert hot.shard_s[0] > 3 * even.shard_s[0]


def test_one_token():
    cost = step_cost(random_trace(tokens=1), Placement.linear(2, 16, 4, 2), tokens=1)
    assert cost.num_routers == 1
    assert cost.step_s > 0


def test_whether_it_pays():
    trace, placement = random_trace(), Placement.linear(2, 16, 4)
    topology = Topology.uniform(4, memory_bytes=10**9)
    small = compare_with_engine(trace, placement, topology=topology, model=ModelShape(256, 128), tokens=1)
    assert not small.pays
    assert "does not pay" in small.why
    large = compare_with_engine(trace, placement, model=ModelShape(7168, 2048), tokens=256)
    assert large.pays
    assert large.mesh_s < large.engine_s
    too_big = compare_with_engine(trace, placement, topology=topology, model=ModelShape(4096, 4096), tokens=1)
    assert too_big.pays
    assert "cannot hold them" in too_big.why
    split = compare_with_engine(trace, placement, model=ModelShape(7168, 2048), tokens=256, engine_gpus=8)
    assert split.engine_s < large.engine_s


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 0}, "tokens is 0"),
        ({"batches": 0}, "batches is 0"),
        ({"router_nodes": [1]}, r"router_nodes is \[1\], expected nodes from 0 to 0"),
        ({"topology": Topology.uniform(3)}, "the topology has 3 ranks, the placement 4"),
        ({"current": Placement.linear(2, 16, 8)}, "the current placement has 8 ranks, the target 4"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        step_cost(random_trace(tokens=4), Placement.linear(2, 16, 4), **arguments)


def test_counts_alone_are_refused():
    trace = ActivationTrace(np.zeros((0, 2, 1), np.int16), 16, counts=np.ones((2, 16)))
    with pytest.raises(TraceError, match="only counts"):
        step_cost(trace, Placement.linear(2, 16, 4))


def test_bad_constants():
    with pytest.raises(ValueError, match="memory_bytes_per_s 0"):
        Constants(0, 1, 0, 0, 0)
    with pytest.raises(ValueError, match="hidden_size is 0"):
        ModelShape(hidden_size=0)
    assert H100.flops_per_s > 0
