"""The cost of a step: against sums by hand, against a slow definition, and the direction of every term."""

from __future__ import annotations

import numpy as np
import pytest

from placement.capacity.transports import TRANSPORTS, transport_links
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


def test_routers_are_not_merged_and_speed_divides():
    trace = trace_of([[[0]], [[1]]], 2)
    placement = Placement(2, 2, 2, np.array([[0, 1]]))
    topology = Topology(np.array([0, 1]), np.array([0, 0]), np.ones(2), np.array([1.0, 0.5]), LINKS)
    cost = step_cost(trace, placement, model=MODEL, constants=UNIT, topology=topology, tokens=2, batches=4)
    assert cost.router_s.tolist() == [5.5]
    # One router's token wants the fast shard, the other's the slow one, which reads its expert in twice the time.
    assert cost.shard_s.tolist() == [(120 + 240) / 2 + 3.0]
    assert cost.weights_s.tolist() == [180.0]
    assert cost.wait_s.tolist() == [0.0]
    assert cost.activated == 2


def test_speeds_of_the_placement_count_where_no_topology_is_given():
    trace = trace_of([[[0]], [[1]]], 2)
    placement = Placement(2, 1, 2, np.array([[0, 1]]), speeds=(1.0, 0.5))
    cost = step_cost(trace, placement, model=MODEL, constants=UNIT, tokens=2, batches=1)
    assert cost.shard_s.tolist() == [240 + 3.0]


def test_tokens_of_several_routers_wait_for_each_other_and_share_reads_only_where_they_meet():
    # One shard, everybody wants the same expert, reading is all that takes time: alone 120 s a layer.
    trace, placement = trace_of([[[0]]] * 8, 1), Placement(1, 1, 1, np.array([[0]]))
    free = Links(node=Link(bandwidth_bytes_per_s=1e15, latency_s=0))
    reads = Constants(1.0, 1e15, 0.0, 0.0, 0.0)
    given = {"model": MODEL, "constants": reads, "topology": Topology.uniform(1, links=free), "tokens": 8}
    alone = step_cost(trace, placement, router_nodes=[0], **given)
    together = step_cost(trace, placement, router_nodes=[0] * 4, **given)
    assert alone.step_s == pytest.approx(120)
    # One router's request is computed while those of the three others wait for the next call, which is one.
    assert together.shard_s[0] + together.wait_s[0] == pytest.approx(240)
    # Shards are free while routers think, so they meet less.
    rare = step_cost(trace, placement, router_nodes=[0] * 4, think_s=1e6, **given)
    assert rare.wait_s[0] < together.wait_s[0]


def test_a_message_costs_its_sender():
    trace = trace_of([[[0, 1]]], 2)
    placement = Placement(2, 1, 2, np.array([[0, 1]]))
    cheap, dear = (Links(node=Link(bandwidth_bytes_per_s=2.0, latency_s=0.25, message_s=m)) for m in (0.0, 4.0))
    first, second = (
        step_cost(trace, placement, model=MODEL, constants=UNIT, topology=Topology.uniform(2, links=links), tokens=1)
        for links in (cheap, dear)
    )
    assert second.wire_s[0] - first.wire_s[0] == pytest.approx(2 * 2 * 4.0)


def test_what_reading_hides_of_computing():
    trace, placement = trace_of([[[0]]], 1), Placement(1, 1, 1, np.array([[0]]))
    by_overlap = [
        float(step_cost(
            trace, placement, model=MODEL, tokens=1,
            constants=Constants(1.0, 4.0, 3.0, 0.0, 0.0, overlap=overlap, row_s=0.5),
        ).shard_s[0])
        for overlap in (1.0, 0.5, 0.0)
    ]  # fmt: skip
    assert by_overlap == [120 + 3.5, 120 + 30 + 3.5, 120 + 60 + 3.5]


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
    even = step_cost(trace, together, constants=slow, tokens=32, router_nodes=[0])
    hot = step_cost(skewed, together, constants=slow, tokens=32, router_nodes=[0])
    assert hot.shard_s[0] > 3 * even.shard_s[0]


def test_one_token():
    cost = step_cost(random_trace(tokens=1), Placement.linear(2, 16, 4, 2), tokens=1)
    assert cost.num_routers == 1
    assert cost.step_s > 0


ONE_TOKEN = trace_of([[[0, 1]]], 4)
TWO_RANKS = Placement(2, 1, 4, np.array([[0, 1, 2, 3]]))


def against_engine(topology=None, **more):
    topology = topology or Topology.uniform(2, links=LINKS)
    given = {"model": MODEL, "constants": UNIT, "topology": topology, "tokens": 1, "batches": 1} | more
    return compare_with_engine(ONE_TOKEN, TWO_RANKS, **given)


def test_an_engine_has_as_many_gpus_as_shards_and_routers_together():
    # Two shards and a router: three GPUs read a third of two experts each, and reduce a row of 10 B.
    verdict = against_engine()
    assert verdict.gpus == 3
    assert verdict.engine_s == pytest.approx(2 * 120 / 3 + 3.0 + 2 * (2 / 3) * 10 / 2.0 + 2 * 0.25)
    assert verdict.mesh_s == pytest.approx(5.5 + (10 + 16) / 2.0 + 0.25 + 10 / 2.0 + 0.25 + 240 + 3.0)
    assert not verdict.pays
    assert "does not pay" in verdict.why
    assert against_engine(router_nodes=[0, 0, 0], tokens=3).gpus == 5


def test_unlike_gpus_an_engine_goes_at_the_pace_of_the_slowest():
    # The slow rank's experts are not wanted, so the mesh does not wait for it.
    topology = Topology(np.zeros(2), np.zeros(1), np.ones(2) * 1e9, np.array([1.0, 0.1]), LINKS)
    verdict = against_engine(topology)
    assert verdict.engine_s == pytest.approx(10 * 2 * 120 / 3 + 3.0 + 2 * (2 / 3) * 10 / 2.0 + 2 * 0.25)
    assert verdict.mesh_s == pytest.approx(against_engine().mesh_s)
    assert verdict.pays


def test_an_engine_across_nodes_reduces_across_nodes():
    near, far = (Topology.uniform(2, nodes, links=LINKS) for nodes in (1, 2))
    one, other = against_engine(near, router_nodes=[0]), against_engine(far, router_nodes=[0])
    assert other.engine_s - one.engine_s == pytest.approx(2 * (2 / 3) * 10 * (1 / 1.0 - 1 / 2.0) + 2 * (0.5 - 0.25))


@pytest.mark.parametrize(
    ("memory", "more", "why"),
    [
        # Two experts of 120 B on each shard; four on three GPUs.
        ((240, 240), {}, "does not pay"),
        ((240, 239), {}, "shard 1 needs 240 B for its experts and has 239 B; an engine of 3 GPUs needs 480 B"),
        ((10**6, 479), {"model_layers": 2}, "shard 1 needs 480 B for its experts and has 479 B"),
        ((240, 240), {"dense_bytes": 300}, "a router needs 300 B for the dense layers and has 240 B"),
        ((240, 240), {"dense_bytes": 240}, "does not pay"),
    ],
)
def test_shards_and_routers_need_memory(memory, more, why):
    topology = Topology(np.zeros(2), np.zeros(1), np.array(memory), np.ones(2), LINKS)
    verdict = against_engine(topology, **more)
    assert not verdict.pays
    assert why in verdict.why


def test_an_engine_that_cannot_hold_the_model_loses():
    # One shard holds all four experts. An engine would have to divide them evenly, over small GPUs too.
    placement = Placement(3, 1, 4, np.array([[0, 1, 2, 3, -1, -1]]))
    topology = Topology(np.zeros(3), np.zeros(1), np.array([1000, 1000, 100]), np.ones(3), LINKS)
    verdict = compare_with_engine(
        ONE_TOKEN, placement, topology=topology, model=MODEL, constants=UNIT, tokens=1, batches=1
    )
    assert verdict.pays
    assert "an engine of 4 GPUs needs 480 B and has 400 B: it cannot hold them" in verdict.why


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 0}, "tokens is 0"),
        ({"batches": 0}, "batches is 0"),
        ({"think_s": -1.0}, "think_s is -1.0"),
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


def test_shared_memory_tcp_and_nccl_are_told_apart():
    trace, placement = random_trace(), Placement.linear(2, 16, 4, 2)
    near, far = {}, {}
    for within, beyond in (("shm", "tcp"), ("cuda_ipc", "nccl")):
        topology = Topology.uniform(4, 2, links=transport_links(within, beyond))
        cost = step_cost(trace, placement, topology=topology, tokens=1, router_nodes=[0])
        near[within], far[beyond] = cost.link_s["node"], cost.link_s["rack"]
    assert near["shm"] < far["tcp"]
    assert near["cuda_ipc"] < far["nccl"]
    assert len({*near.values(), *far.values()}) == 4
    assert {name for name, one in TRANSPORTS.items() if one.measured} == {"shm", "tcp"}
    assert all(one.measured != one.source.startswith("estimate") for one in TRANSPORTS.values())
    with pytest.raises(ValueError, match="shm does not reach other nodes"):
        transport_links("shm", "shm")
    with pytest.raises(ValueError, match="transport is 'gloo', expected one of shm, tcp, cuda_ipc, nccl"):
        transport_links("gloo", "tcp")


def test_bad_constants():
    with pytest.raises(ValueError, match="overlap is 1"):
        Constants(1, 1, 0, 0, 0, overlap=1.5)
    with pytest.raises(ValueError, match="must not be negative"):
        Constants(1, 1, 0, 0, 0, row_s=-1)
    with pytest.raises(ValueError, match="memory_bytes_per_s 0"):
        Constants(0, 1, 0, 0, 0)
    with pytest.raises(ValueError, match="hidden_size is 0"):
        ModelShape(hidden_size=0)
    assert H100.flops_per_s > 0
