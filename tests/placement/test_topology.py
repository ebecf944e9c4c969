"""Topologies from YAML and from Ray's cluster state: what is read, and what is refused by name."""

from __future__ import annotations

import numpy as np
import pytest

from placement.topology import Topology, TopologyError, topology_from_ray

TWO_RACKS = """
links:
  rack: {bandwidth_bytes_per_s: 25.0e+9, latency_s: 1.0e-5}
racks:
  - name: east
    nodes:
      - name: n1
        shards: [{count: 2, memory_bytes: 60000000000}]
      - name: n2
        shards:
          - {memory_bytes: 60000000000}
          - {memory_bytes: 30000000000, speed: 0.5}
  - name: west
    nodes:
      - name: n3
        shards: [{count: 2, memory_bytes: 60000000000}]
"""


def test_a_yaml_file(tmp_path):
    path = tmp_path / "topology.yaml"
    path.write_text(TWO_RACKS)
    topology = Topology.from_yaml(path)
    assert topology.node_of_rank_R.tolist() == [0, 0, 1, 1, 2, 2]
    assert topology.rack_of_rank_R.tolist() == [0, 0, 0, 0, 1, 1]
    assert topology.speed_R.tolist() == [1, 1, 1, 0.5, 1, 1]
    assert topology.node_names == ("n1", "n2", "n3")
    assert topology.links.rack.bandwidth_bytes_per_s == 25e9
    assert topology.distance_RR[0].tolist() == [0, 1, 2, 2, 3, 3]
    assert (topology.distance_RR == topology.distance_RR.T).all()
    assert topology.slots_per_rank(10**9, 3) == (20, 20, 20, 10, 20, 20)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("racks:", "rack:", r"rack: Extra inputs are not permitted"),
        ("name: n2", "name: n1", "node 'n1' is listed twice"),
        ("name: west", "name: east", "rack 'east' is listed twice"),
        ("speed: 0.5", "speed: 0", r"racks.0.nodes.1.shards.1.speed: .* greater than 0, got 0"),
        ("speed: 0.5", "pace: 0.5", r"racks.0.nodes.1.shards.1.pace: Extra inputs"),
        ("latency_s: 1.0e-5", "latency_s: soon", r"links.rack.latency_s: .*got 'soon'"),
        ("count: 2", "count: 0", r"racks.0.nodes.0.shards.0.count: .*got 0"),
        ("- {memory_bytes: 60000000000}", "- {}", r"racks.0.nodes.1.shards.0.memory_bytes: Field required"),
        ("links:", "links: [", "not YAML"),
    ],
)
def test_a_bad_file_is_refused_by_key(tmp_path, old, new, message):
    path = tmp_path / "topology.yaml"
    path.write_text(TWO_RACKS.replace(old, new, 1))
    with pytest.raises(TopologyError, match=message) as caught:
        Topology.from_yaml(path)
    assert "topology.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file_and_no_mapping(tmp_path):
    with pytest.raises(TopologyError, match="No such file"):
        Topology.from_yaml(tmp_path / "none.yaml")
    with pytest.raises(TopologyError, match="a topology is a mapping with `racks`, got list"):
        Topology.from_data([])


def ray_node(address, gpus=4.0, kind="H100", zone="", alive=True, name=None):
    resources = {"CPU": 64.0, f"node:{address}": 1.0, "memory": 1e12}
    if gpus:
        resources |= {"GPU": gpus, f"accelerator_type:{kind}": 1.0}
    return {
        "NodeID": f"id-{address}",
        "NodeName": name or address,
        "NodeManagerAddress": address,
        "Alive": alive,
        "Resources": resources if alive else {},
        "Labels": {"ray.io/node-id": f"id-{address}"} | ({"ray.io/availability-zone": zone} if zone else {}),
    }


def test_ray_nodes():
    nodes = [
        ray_node("10.0.0.3", gpus=2.0, kind="A100", zone="b"),
        ray_node("10.0.0.9", alive=False),
        ray_node("10.0.0.1", gpus=0),
        ray_node("10.0.0.2", gpus=2.0, zone="a"),
    ]
    topology = topology_from_ray(nodes, memory_bytes={"H100": 70, "A100": 60}, speed={"H100": 1.0, "A100": 0.6})
    assert topology.node_names == ("10.0.0.2", "10.0.0.3")
    assert topology.node_of_rank_R.tolist() == [0, 0, 1, 1]
    assert topology.rack_of_node_N.tolist() == [0, 1]
    assert topology.memory_bytes_R.tolist() == [70, 70, 60, 60]
    assert topology.speed_R.tolist() == [1.0, 1.0, 0.6, 0.6]
    shuffled = topology_from_ray(nodes[::-1], memory_bytes={"H100": 70, "A100": 60})
    assert shuffled.node_names == topology.node_names
    assert (shuffled.speed_R == 1).all()


def test_ray_nodes_without_gpus_and_of_one_name():
    nodes = [ray_node(f"10.0.0.{n}", gpus=0, name="host") for n in (1, 2)]
    topology = topology_from_ray(nodes, memory_bytes=5, shards_per_node=3)
    assert topology.num_ranks == 6
    assert topology.node_names == ("host/id-10.0.0.1", "host/id-10.0.0.2")
    assert topology.num_racks == 1


def test_ray_nodes_that_cannot_be_used():
    with pytest.raises(TopologyError, match="none of 1 nodes is alive with a GPU"):
        topology_from_ray([ray_node("10.0.0.1", gpus=0)], memory_bytes=5)
    with pytest.raises(TopologyError, match=r"node 10.0.0.1 has L4, for which no memory_bytes is given"):
        topology_from_ray([ray_node("10.0.0.1", kind="L4")], memory_bytes={"H100": 5})


def test_too_little_memory_is_refused_with_both_sizes():
    topology = Topology(np.array([0, 0, 1]), np.array([0, 0]), np.full(3, 100), np.ones(3))
    with pytest.raises(TopologyError, match="one slot in 2 layers takes 102 bytes, the largest shard has 100"):
        topology.slots_per_rank(51, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (([0, 2], [0, 0, 0], [1, 1], [1, 1]), "node_of_rank_R must count nodes up from 0 without a gap"),
        (([0, 1], [0], [1, 1], [1, 1]), "ranks stand on 2 nodes, racks hold 1"),
        (([0, 1], [0, 0], [1, 0], [1, 1]), "memory_bytes_R must be 2 numbers above 0"),
        (([0, 1], [0, 0], [1, 1], [1]), "speed_R must be 2 numbers above 0"),
        (([], [], [], []), "node_of_rank_R must be one-dimensional and not empty"),
    ],
)
def test_bad_arrays(fields, message):
    with pytest.raises(TopologyError, match=message):
        Topology(*(np.array(field) for field in fields))
