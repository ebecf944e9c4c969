"""A placement: which logical expert each slot of each rank holds, in every layer.

L layers, E logical experts, S slots (physical experts), R ranks, s slots of one rank (S // R), M most replicas of
an expert. Slots are dealt to ranks in order, `S // R` each, and ranks to nodes likewise. An empty slot is -1; a rank
with fewer slots than the others is padded with -1.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from placement.linear import EMPTY, linear_row
from placement.speeds import check_speeds, work_of_speeds


class ModelSize(Protocol):
    """Whatever is of one model: a placement, a trace, a checkpoint's spec."""

    @property
    def num_layers(self) -> int:
        """MoE layers."""

    @property
    def num_experts(self) -> int:
        """Routed experts of a layer."""


@dataclass(frozen=True, eq=False)
class Placement:
    """The slots of every layer, and the ranks and nodes that have them.

    `physical_to_logical_map` int32 [L, S]; with 2 ranks, `[[0, 1, 2, 0]]` puts experts 0 and 1 on rank 0, and expert 2
    and a second replica of expert 0 on rank 1. Raises ValueError, naming layer, expert and rank, if an expert has no
    slot, an id is out of range, or slots, ranks and nodes do not divide evenly.

    `nodes` gives the node of each rank, 0 to num_nodes - 1, where nodes are no equal blocks of ranks. A `partial`
    placement may lack experts: what shards hold while some are lost or still load. `speeds` of ranks are relative to
    each other; None: all equal. The rule weighs loads by them.
    """

    num_ranks: int
    num_nodes: int
    num_experts: int
    physical_to_logical_map: np.ndarray
    nodes: tuple[int, ...] | None = None
    partial: bool = False
    speeds: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        given = np.asarray(self.physical_to_logical_map)
        if given.ndim != 2 or not np.issubdtype(given.dtype, np.integer):
            raise ValueError(
                f"physical_to_logical_map must be integers [layers, slots], got {given.dtype} {list(given.shape)}"
            )
        # Checked before the cast: 2**32 would become expert 0.
        if given.size and max(-int(given.min()), int(given.max())) >= 2**31:
            raise ValueError(
                f"physical_to_logical_map holds {given.min()} to {given.max()}, expected -1 to {self.num_experts - 1}"
            )
        copy = np.ascontiguousarray(given, dtype=np.int32).copy()
        copy.setflags(write=False)
        object.__setattr__(self, "physical_to_logical_map", copy)
        if self.nodes is not None:
            object.__setattr__(self, "nodes", tuple(int(node) for node in self.nodes))
        if self.speeds is not None:
            check_speeds(self.speeds, self.num_ranks)
            speeds = tuple(float(speed) for speed in self.speeds)
            object.__setattr__(self, "speeds", speeds if len(set(speeds)) > 1 else None)
        self.check()

    def __reduce__(self) -> tuple[type[Placement], tuple[Any, ...]]:
        """Pickle the fields alone: the copy is checked and read-only again, and tables stay behind."""
        fields = (self.num_ranks, self.num_nodes, self.num_experts, self.physical_to_logical_map)
        return Placement, (*fields, self.nodes, self.partial, self.speeds)

    def check(self) -> None:
        """Raise ValueError unless every expert has a slot in every layer and the shape is consistent."""
        for name in ("num_ranks", "num_nodes", "num_experts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.nodes is None and self.num_ranks % self.num_nodes:
            raise ValueError(f"{self.num_ranks} ranks cannot be dealt evenly to {self.num_nodes} nodes")
        if self.nodes is not None and (
            len(self.nodes) != self.num_ranks or not 0 <= min(self.nodes) <= max(self.nodes) < self.num_nodes
        ):
            raise ValueError(
                f"nodes are {list(self.nodes)}, expected one of 0 to {self.num_nodes - 1} for each of "
                f"{self.num_ranks} ranks"
            )
        if self.num_slots % self.num_ranks:
            raise ValueError(
                f"{self.num_slots} slots cannot be dealt evenly to {self.num_ranks} ranks; pad short ranks with -1"
            )
        if self.num_slots < self.num_experts and not self.partial:
            raise ValueError(f"{self.num_slots} slots cannot hold {self.num_experts} experts")
        map_LS = self.physical_to_logical_map
        wrong = np.argwhere((map_LS < EMPTY) | (map_LS >= self.num_experts))
        if wrong.size:
            layer, slot = wrong[0]
            raise ValueError(
                f"layer {layer}, rank {slot // self.slots_per_rank}: slot {slot} holds expert {map_LS[layer, slot]}, "
                f"expected -1 to {self.num_experts - 1}"
            )
        missing = np.argwhere(self.logical_replica_count == 0)
        if missing.size and not self.partial:
            layer, expert = missing[0]
            raise ValueError(
                f"layer {layer}: expert {expert} has no slot on any of {self.num_ranks} ranks "
                f"({len(missing)} such experts in all layers)"
            )

    @property
    def num_layers(self) -> int:
        return self.physical_to_logical_map.shape[0]

    @property
    def num_slots(self) -> int:
        return self.physical_to_logical_map.shape[1]

    @property
    def slots_per_rank(self) -> int:
        return self.num_slots // self.num_ranks

    @property
    def node_of_rank_R(self) -> np.ndarray:
        """int32 [R]: the node of each rank."""
        if self.nodes is not None:
            return np.array(self.nodes, np.int32)
        return (np.arange(self.num_ranks) // (self.num_ranks // self.num_nodes)).astype(np.int32)

    @property
    def speed_R(self) -> np.ndarray:
        """float64 [R]: relative speed of each rank."""
        return np.array(self.speeds or (1.0,) * self.num_ranks)

    @property
    def work_R(self) -> np.ndarray:
        """int64 [R]: what a (token, expert) pair counts on each rank in the rule for choosing replicas."""
        return work_of_speeds(self.speeds, self.num_ranks)

    @cached_property
    def logical_replica_count(self) -> np.ndarray:
        """int32 [L, E]: the number of slots that hold each expert."""
        layer_L1 = np.arange(self.num_layers)[:, None] * self.num_experts
        filled_LS = self.physical_to_logical_map >= 0
        key_N = (self.physical_to_logical_map + layer_L1)[filled_LS]
        count = np.bincount(key_N, minlength=self.num_layers * self.num_experts)
        return count.reshape(self.num_layers, self.num_experts).astype(np.int32)

    @cached_property
    def logical_to_physical_map(self) -> np.ndarray:
        """int32 [L, E, M]: the slots that hold each expert, ascending, padded with -1."""
        most = max(int(self.logical_replica_count.max()), 1)  # 0 where a partial placement is empty
        table_LEM = np.full((self.num_layers, self.num_experts, most), EMPTY, np.int32)
        filled_LE = np.zeros((self.num_layers, self.num_experts), np.int32)
        every_layer = np.arange(self.num_layers)
        for slot in range(self.num_slots):
            expert_L = self.physical_to_logical_map[:, slot]
            layer_N = every_layer[expert_L >= 0]
            expert_N = expert_L[layer_N]
            table_LEM[layer_N, expert_N, filled_LE[layer_N, expert_N]] = slot
            filled_LE[layer_N, expert_N] += 1
        return table_LEM

    @cached_property
    def slots_LER(self) -> np.ndarray:
        """int32 [L, E, R]: the first slot of each expert on each rank, -1 if it has none there."""
        table_LER = np.full((self.num_layers, self.num_experts, self.num_ranks), EMPTY, np.int32)
        map_LRs = self.physical_to_logical_map.reshape(self.num_layers, self.num_ranks, -1)
        first_R = np.arange(self.num_ranks) * self.slots_per_rank
        # The first slot of a rank is written last.
        for local in reversed(range(self.slots_per_rank)):
            layer_N, rank_N = np.nonzero(map_LRs[:, :, local] >= 0)
            table_LER[layer_N, map_LRs[layer_N, rank_N, local], rank_N] = first_R[rank_N] + local
        return table_LER

    def without_ranks(self, ranks: Collection[int]) -> Placement:
        """The same with some ranks empty: partial where they alone held an expert. Others keep their numbers."""
        map_LRs = self.physical_to_logical_map.reshape(self.num_layers, self.num_ranks, -1).copy()
        for rank in ranks:
            if not 0 <= rank < self.num_ranks:
                raise ValueError(f"rank {rank} is out of range, expected 0 to {self.num_ranks - 1}")
            map_LRs[:, rank] = EMPTY
        map_LS = map_LRs.reshape(self.num_layers, -1)
        left = replace(self, physical_to_logical_map=map_LS, partial=True)
        return left if (left.logical_replica_count == 0).any() else replace(left, partial=False)

    def experts_of_rank(self, rank: int) -> np.ndarray:
        """int32 [L, s]: the logical expert in each slot of a rank, -1 for an empty slot."""
        if not 0 <= rank < self.num_ranks:
            raise ValueError(f"rank {rank} is out of range, expected 0 to {self.num_ranks - 1}")
        return self.physical_to_logical_map[:, rank * self.slots_per_rank : (rank + 1) * self.slots_per_rank]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        mine = (self.num_ranks, self.num_experts, self.node_of_rank_R.tolist(), self.work_R.tolist())
        theirs = (other.num_ranks, other.num_experts, other.node_of_rank_R.tolist(), other.work_R.tolist())
        return mine == theirs and np.array_equal(self.physical_to_logical_map, other.physical_to_logical_map)

    __hash__ = None  # type: ignore[assignment]

    def to_json(self) -> dict[str, Any]:
        """The placement as plain JSON values, as `from_json` reads them."""
        data: dict[str, Any] = {
            "num_ranks": self.num_ranks,
            "num_nodes": self.num_nodes,
            "num_experts": self.num_experts,
            "physical_to_logical_map": self.physical_to_logical_map.tolist(),
        }
        if self.nodes is not None:
            data["nodes"] = list(self.nodes)
        if self.speeds is not None:
            data["speeds"] = list(self.speeds)
        return {**data, "partial": True} if self.partial else data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Placement:
        """The placement in what `to_json` wrote; other keys are ignored.

        `num_nodes` defaults to 1 and `num_experts` to the largest id plus one. Raises ValueError on a missing or
        malformed key.
        """
        if not isinstance(data, dict):
            raise ValueError(f"a placement is a JSON object, got {type(data).__name__}")
        for key in ("num_ranks", "physical_to_logical_map"):
            if key not in data:
                raise ValueError(f"the placement has no {key!r}; it has {sorted(data)}")
        try:
            map_LS = np.array(data["physical_to_logical_map"])
        except ValueError:
            raise ValueError("physical_to_logical_map is ragged: every layer needs the same slots") from None
        if map_LS.size == 0:
            raise ValueError("physical_to_logical_map is empty")
        if not np.issubdtype(map_LS.dtype, np.integer):
            raise ValueError(f"physical_to_logical_map must be integers [layers, slots], got {map_LS.dtype}")
        counts = {
            "num_ranks": data["num_ranks"],
            "num_nodes": data.get("num_nodes", 1),
            "num_experts": data.get("num_experts", int(map_LS.max()) + 1),
        }
        for key, value in counts.items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{key} is {value!r}, expected an integer")
        nodes, partial = data.get("nodes"), data.get("partial", False)
        if nodes is not None and not (isinstance(nodes, list) and all(type(node) is int for node in nodes)):
            raise ValueError(f"nodes is {nodes!r}, expected a list of integers")
        speeds = data.get("speeds")
        if speeds is not None and not (isinstance(speeds, list) and all(type(one) in (int, float) for one in speeds)):
            raise ValueError(f"speeds is {speeds!r}, expected a list of numbers")
        if not isinstance(partial, bool):
            raise ValueError(f"partial is {partial!r}, expected true or false")
        return cls(
            **counts,
            physical_to_logical_map=map_LS,
            nodes=None if nodes is None else tuple(nodes),
            partial=partial,
            speeds=None if speeds is None else tuple(speeds),
        )

    def save(self, path: str | Path) -> None:
        """Write the placement as a JSON file."""
        Path(path).write_text(json.dumps(self.to_json()) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Placement:
        """Read a JSON file. Raises ValueError, naming the file, if it holds no valid placement."""
        try:
            return cls.from_json(json.loads(Path(path).read_text()))
        except (ValueError, RecursionError) as error:  # RecursionError: deeply nested JSON
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_sets(
        cls,
        held_R: Sequence[Iterable[tuple[int, int]]],
        *,
        num_layers: int,
        num_experts: int,
        nodes: tuple[int, ...] | None = None,
        num_nodes: int = 1,
        slots_per_rank: int = 1,
    ) -> Placement:
        """A placement of what ranks hold: the (layer, expert) pairs of each rank, in any order, none for a hole.

        The experts of a rank take its first slots, ascending. There are `slots_per_rank` slots, or as many as the
        fullest layer of a rank takes. The placement is partial where an expert has no slot.
        """
        pairs = [np.array(sorted(held), np.int64).reshape(-1, 2) for held in held_R]
        first = [np.searchsorted(pair[:, 0], pair[:, 0]) for pair in pairs]  # where each pair's layer begins
        local = [np.arange(len(pair)) - start for pair, start in zip(pairs, first, strict=True)]
        width = max([slots_per_rank, *(int(slots.max()) + 1 for slots in local if len(slots))])
        map_LRs = np.full((num_layers, len(pairs), width), EMPTY, np.int32)
        held_LE = np.zeros((num_layers, num_experts), bool)
        for rank, (pair, slots) in enumerate(zip(pairs, local, strict=True)):
            wrong = pair[((pair < 0) | (pair >= (num_layers, num_experts))).any(1)]
            if len(wrong):
                raise ValueError(
                    f"rank {rank} holds expert {wrong[0][1]} of layer {wrong[0][0]}, expected layers 0 to "
                    f"{num_layers - 1} and experts 0 to {num_experts - 1}"
                )
            map_LRs[pair[:, 0], rank, slots] = pair[:, 1]
            held_LE[pair[:, 0], pair[:, 1]] = True
        partial = not bool(held_LE.all())
        return cls(len(pairs), num_nodes, num_experts, map_LRs.reshape(num_layers, -1), nodes=nodes, partial=partial)

    @classmethod
    def linear(
        cls, num_layers: int, num_experts: int, num_ranks: int, num_nodes: int = 1, min_replicas: int = 1
    ) -> Placement:
        """Contiguous blocks of experts on ranks, the same in every layer; needs no trace.

        With `min_replicas` above 1, the other replicas of an expert are on other ranks, and on other nodes if there are
        several. The replicas of one rank's experts are on as many different ranks as possible, so that the load of a
        lost rank spreads over them. Raises ValueError if there are not enough ranks or nodes for that.
        """
        if min(num_layers, num_experts, num_ranks, num_nodes, min_replicas) < 1:
            raise ValueError(
                f"{num_layers} layers, {num_experts} experts, {num_ranks} ranks, {num_nodes} nodes, "
                f"{min_replicas} replicas: each must be at least 1"
            )
        row = linear_row(num_experts, num_ranks, num_nodes, min_replicas)
        return cls(num_ranks, num_nodes, num_experts, np.tile(np.array(row, np.int32), (num_layers, 1)))


def check_same_model(name: str, one: ModelSize, other_name: str, other: ModelSize) -> None:
    """Raise ValueError with both sizes unless two things are of the same model: "the placement", "the trace"."""
    if (one.num_layers, one.num_experts) != (other.num_layers, other.num_experts):
        raise ValueError(
            f"{name} is for {one.num_layers} layers of {one.num_experts} experts, "
            f"{other_name} for {other.num_layers} of {other.num_experts}"
        )
