"""The machines a placement is for: shards in nodes in racks, and the links between them.

R ranks (shards), N nodes. Ranks are numbered in the order in which racks, nodes and shards are listed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

LINK_CLASSES = ("rank", "node", "rack", "cluster")  # index: how far apart, as in `distance_RR`


class TopologyError(ValueError):
    """A topology that cannot be used. The message is one line that names the key or the node."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class Link(_Strict):
    """What one end of a connection can send to all others of its class together."""

    bandwidth_bytes_per_s: float = Field(gt=0, description="Bytes a second, one direction, of one shard's end.")
    latency_s: float = Field(ge=0, description="Seconds from sending the first byte to its arrival.")
    message_s: float = Field(
        default=0.0, ge=0, description="Seconds of a sender for each message, besides its bytes and latency."
    )


class Links(_Strict):
    """One link for each class. The defaults are nominal figures of the hardware; replace them by measured ones."""

    rank: Link = Field(
        default=Link(bandwidth_bytes_per_s=1.5e12, latency_s=2e-6), description="Within a shard: device memory."
    )
    node: Link = Field(
        default=Link(bandwidth_bytes_per_s=400e9, latency_s=5e-6),
        description="Shards of one node: NVLink (450 GB/s nominal on an H100).",
    )
    rack: Link = Field(
        default=Link(bandwidth_bytes_per_s=45e9, latency_s=15e-6),
        description="Nodes of one rack: one 400 Gbit/s adapter for each GPU (50 GB/s nominal).",
    )
    cluster: Link = Field(
        default=Link(bandwidth_bytes_per_s=45e9, latency_s=25e-6), description="Across racks; less if oversubscribed."
    )
    checkpoint: Link = Field(
        default=Link(bandwidth_bytes_per_s=2e9, latency_s=1e-3),
        description="Storage that weights are read from if no rank has them.",
    )


class _Shards(_Strict):
    count: int = Field(default=1, ge=1, description="How many shards of this kind the node has.")
    memory_bytes: int = Field(gt=0, description="Memory for expert weights on each shard.")
    speed: float = Field(default=1.0, gt=0, description="Speed relative to the other shards.")


class _Node(_Strict):
    name: str = Field(min_length=1, description="Unique name.")
    shards: list[_Shards] = Field(min_length=1, description="Shards of the node, in rank order.")


class _Rack(_Strict):
    name: str = Field(min_length=1, description="Unique name.")
    nodes: list[_Node] = Field(min_length=1, description="Nodes of the rack.")


class _File(_Strict):
    links: Links = Field(default_factory=Links, description="Bandwidth and latency of each link class.")
    racks: list[_Rack] = Field(min_length=1, description="The racks.")


@dataclass(frozen=True, eq=False)
class Topology:
    """The node and rack of each rank, its memory and speed, and the links.

    Attributes:
        node_of_rank_R: int32 [R], ascending from 0 without a gap.
        rack_of_node_N: int32 [N], likewise.
        memory_bytes_R: int64 [R], memory for expert weights.
        speed_R: float64 [R], relative speed.
        links: one of each class.
        node_names: N names.
    """

    node_of_rank_R: np.ndarray
    rack_of_node_N: np.ndarray
    memory_bytes_R: np.ndarray
    speed_R: np.ndarray
    links: Links = field(default_factory=Links)
    node_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, dtype in (
            ("node_of_rank_R", np.int32),
            ("rack_of_node_N", np.int32),
            ("memory_bytes_R", np.int64),
            ("speed_R", np.float64),
        ):
            array = np.array(getattr(self, name), dtype=dtype)
            if array.ndim != 1 or not array.size:
                raise TopologyError(f"{name} must be one-dimensional and not empty, got {list(array.shape)}")
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        for name, of in (("node_of_rank_R", "nodes"), ("rack_of_node_N", "racks")):
            array = getattr(self, name)
            if array[0] != 0 or not np.isin(np.diff(array), (0, 1)).all():
                raise TopologyError(f"{name} must count {of} up from 0 without a gap, got {array.tolist()}")
        if self.num_nodes != len(self.rack_of_node_N):
            raise TopologyError(f"ranks stand on {self.num_nodes} nodes, racks hold {len(self.rack_of_node_N)}")
        for name in ("memory_bytes_R", "speed_R"):
            array = getattr(self, name)
            if len(array) != self.num_ranks or not (array > 0).all():
                raise TopologyError(f"{name} must be {self.num_ranks} numbers above 0, got {array.tolist()}")
        names = tuple(self.node_names) or tuple(f"node{n}" for n in range(self.num_nodes))
        if len(names) != self.num_nodes or len(set(names)) != len(names):
            raise TopologyError(f"node_names must be {self.num_nodes} different names, got {list(names)}")
        object.__setattr__(self, "node_names", names)

    @property
    def num_ranks(self) -> int:
        return len(self.node_of_rank_R)

    @property
    def num_nodes(self) -> int:
        return int(self.node_of_rank_R[-1]) + 1

    @property
    def num_racks(self) -> int:
        return int(self.rack_of_node_N[-1]) + 1

    @property
    def rack_of_rank_R(self) -> np.ndarray:
        """int32 [R]."""
        return self.rack_of_node_N[self.node_of_rank_R]

    @cached_property
    def distance_RR(self) -> np.ndarray:
        """int8 [R, R]: the link class between two ranks, 0 same rank, 1 same node, 2 same rack, 3 across racks."""
        node_R, rack_R = self.node_of_rank_R, self.rack_of_rank_R
        distance_RR = np.where(rack_R[:, None] == rack_R[None, :], 2, 3)
        distance_RR[node_R[:, None] == node_R[None, :]] = 1
        np.fill_diagonal(distance_RR, 0)
        return distance_RR.astype(np.int8)

    def slots_per_rank(self, expert_bytes: int, num_layers: int) -> tuple[int, ...]:
        """Slots in each layer that each rank has memory for, the same number in every layer.

        Raises TopologyError if no rank can hold one expert of every layer.
        """
        if expert_bytes < 1 or num_layers < 1:
            raise TopologyError(f"{expert_bytes} bytes an expert, {num_layers} layers: each must be at least 1")
        slots_R = self.memory_bytes_R // (expert_bytes * num_layers)
        if not slots_R.any():
            raise TopologyError(
                f"one slot in {num_layers} layers takes {expert_bytes * num_layers} bytes, "
                f"the largest shard has {int(self.memory_bytes_R.max())}"
            )
        return tuple(slots_R.tolist())

    @classmethod
    def uniform(
        cls,
        num_ranks: int,
        num_nodes: int = 1,
        nodes_per_rack: int | None = None,
        memory_bytes: int = 80 * 10**9,
        links: Links | None = None,
    ) -> Topology:
        """Identical ranks, equally many on each node; one rack unless `nodes_per_rack` is given."""
        if num_ranks < 1 or num_nodes < 1 or num_ranks % num_nodes:
            raise TopologyError(f"{num_ranks} ranks cannot be dealt evenly to {num_nodes} nodes")
        if nodes_per_rack is not None and nodes_per_rack < 1:
            raise TopologyError(f"nodes_per_rack is {nodes_per_rack}, expected at least 1")
        return cls(
            np.arange(num_ranks) // (num_ranks // num_nodes),
            np.arange(num_nodes) // (nodes_per_rack or num_nodes),
            np.full(num_ranks, memory_bytes),
            np.ones(num_ranks),
            links or Links(),
        )

    @classmethod
    def from_yaml(cls, path: str | Path) -> Topology:
        """Read a YAML file with `links` and `racks`, which have `nodes`, which have `shards`.

        Example:
            links: {rack: {bandwidth_bytes_per_s: 25.0e+9, latency_s: 1.0e-5}}
            racks:
              - name: r1
                nodes: [{name: n1, shards: [{count: 8, memory_bytes: 60000000000, speed: 1.0}]}]

        Raises TopologyError naming file, key and value; unknown keys are refused.
        """
        try:
            data = yaml.safe_load(Path(path).read_text())
        except OSError as error:
            raise TopologyError(f"{path}: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise TopologyError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
        try:
            return cls.from_data(data)
        except TopologyError as error:
            raise TopologyError(f"{path}: {error}") from None

    @classmethod
    def from_data(cls, data: Any) -> Topology:
        """The topology in plain data, as `from_yaml` reads it."""
        if not isinstance(data, dict):
            raise TopologyError(f"a topology is a mapping with `racks`, got {type(data).__name__}")
        try:
            file = _File.model_validate(data)
        except ValidationError as error:
            # Report a misspelt key before the missing key it causes.
            first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
            where = ".".join(str(part) for part in first["loc"])
            given = "" if first["type"] == "missing" else f", got {first['input']!r}"
            raise TopologyError(f"{where}: {first['msg']}{given}") from None
        racks = [rack.name for rack in file.racks]
        nodes = [(index, node) for index, rack in enumerate(file.racks) for node in rack.nodes]
        for what, names in (("rack", racks), ("node", [node.name for _, node in nodes])):
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                raise TopologyError(f"{what} {twice[0]!r} is listed twice")
        shards = [(n, group) for n, (_, node) in enumerate(nodes) for group in node.shards for _ in range(group.count)]
        return cls(
            np.array([n for n, _ in shards]),
            np.array([rack for rack, _ in nodes]),
            np.array([group.memory_bytes for _, group in shards]),
            np.array([group.speed for _, group in shards]),
            file.links,
            tuple(node.name for _, node in nodes),
        )


def topology_from_ray(
    nodes: Sequence[Mapping[str, Any]],
    *,
    memory_bytes: int | Mapping[str, int],
    speed: Mapping[str, float] | None = None,
    shards_per_node: int | None = None,
    rack_label: str = "ray.io/availability-zone",
    links: Links | None = None,
) -> Topology:
    """The topology of a Ray cluster, from what `ray.nodes()` returns.

    Args:
        nodes: dictionaries with `Alive`, `NodeID`, `NodeName`, `NodeManagerAddress`, `Resources` and `Labels`. Dead
            nodes are left out, and nodes without a GPU if GPUs are counted. Nodes are sorted by rack, then by address,
            so that the same cluster always gives the same ranks.
        memory_bytes: for expert weights on each shard. A mapping gives it for each accelerator type, as Ray names them
            (`H100`, from the resource `accelerator_type:H100`), and for `cpu`: nodes without an accelerator.
        speed: relative speed of each accelerator type; all types must be given. None: all equal.
        shards_per_node: shards on each node; None: one for each GPU.
        rack_label: the node label that names the rack; nodes without it share one rack.

    Raises TopologyError naming the node.
    """
    found = []
    for node in nodes:
        if not node.get("Alive", False):
            continue
        resources = node.get("Resources") or {}
        name = str(node.get("NodeName") or node.get("NodeID") or node.get("NodeManagerAddress"))
        kinds = [key.split(":", 1)[1] for key in resources if key.startswith("accelerator_type:")]
        kind = kinds[0] if kinds else "cpu"
        count = shards_per_node if shards_per_node is not None else int(resources.get("GPU", 0))
        if count < 1:
            continue
        rack = str((node.get("Labels") or {}).get(rack_label, ""))
        found.append((rack, str(node.get("NodeManagerAddress", "")), str(node.get("NodeID", "")), name, kind, count))
    if not found:
        raise TopologyError(f"none of {len(nodes)} nodes is alive with a GPU; give shards_per_node to count others")
    found.sort()
    racks = sorted({rack for rack, *_ in found})
    names = [name for *_, name, _, _ in found]
    if len(set(names)) < len(names):
        names = [f"{name}/{node_id}" for _, _, node_id, name, _, _ in found]
    node_R, memory_R, speed_R = [], [], []
    for index, (*_, name, kind, count) in enumerate(found):
        for what, table in (("memory_bytes", memory_bytes), ("speed", speed)):
            if isinstance(table, Mapping) and kind not in table:
                raise TopologyError(f"node {name} has {kind}, for which no {what} is given; given: {sorted(table)}")
        node_R += [index] * count
        memory_R += [memory_bytes[kind] if isinstance(memory_bytes, Mapping) else memory_bytes] * count
        speed_R += [speed[kind] if speed is not None else 1.0] * count
    return Topology(
        np.array(node_R),
        np.array([racks.index(rack) for rack, *_ in found]),
        np.array(memory_R),
        np.array(speed_R),
        links or Links(),
        tuple(names),
    )
