"""Which placement the shards should have: the one planned, changed as shards come and go. Without Ray or a clock.

A shard that is lost keeps its place in the target for `replace_after_s`, since Serve starts another. After that the
others take its experts. A shard that comes when there are as many as Serve wants already is the successor of one that
is about to stop: it gets that one's experts when it does. How to place experts on other shards is the matter of
`placement.search.few_copies`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cluster.mesh.planning import protected_experts
from placement.placement import Placement
from placement.search.few_copies.resize import resize

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, eq=False)
class Target:
    """A placement to reach. `origin` says why: the config, a command, a change of shards. Versions count up."""

    version: int
    origin: str
    placement: Placement
    policy: str = ""  # digest of the settings that the last plan followed
    load_LE: np.ndarray | None = None  # float [L, E] that it was planned for; None: unknown, as good as even

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as `from_json` reads them."""
        load = None if self.load_LE is None else self.load_LE.tolist()
        return {**vars(self), "placement": self.placement.to_json(), "load_LE": load}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Target:
        """Inverse of `to_json`."""
        load = data["load_LE"]
        return cls(
            **{
                **data,
                "placement": Placement.from_json(data["placement"]),
                "load_LE": None if load is None else np.array(load, np.float64),
            }
        )


@dataclass(frozen=True)
class Limits:
    """What every target keeps to."""

    min_replicas: int = 1
    spare_slots: int = 1
    protect: float = 0.0  # share of the traffic, 0 to 1, whose most used experts have two replicas


@dataclass
class TargetKeeper:
    """The target, and which shards it is for."""

    limits: Limits = field(default_factory=Limits)
    target: Target | None = None
    problem: str = ""
    """Why there is no target for the shards at hand, one line; empty if there is."""
    _made_for: dict[int, int] = field(default_factory=dict)
    """Slots by rank: the shards that the target, or the problem, is for."""

    @property
    def ranks(self) -> set[int]:
        """Ranks that the target gives experts to."""
        return set(self._made_for)

    def slots_of(self, rank: int) -> int:
        """Slots of a layer of the shard that the target counts on at `rank`."""
        return self._made_for[rank]

    def set(self, target: Target, slots: Mapping[int, int]) -> None:
        """A placement for the shards with these `slots` by rank; its version is raised above the present one's."""
        if self.target is not None and target.version <= self.target.version:
            target = replace(target, version=self.target.version + 1)
        self.target, self.problem = target, ""
        self._made_for = dict(slots)

    def keep_policy(self, policy: str) -> None:
        """The target stays as it is, though it was to follow these settings."""
        assert self.target is not None
        self.target = replace(self.target, policy=policy)

    def follow(self, slots: Mapping[int, int], nodes: Mapping[int, str], newcomers: int) -> bool:
        """Suit the target to the shards at hand; returns whether it changed.

        `slots` by rank: the shards that stay, those awaited among them. At most `newcomers` ranks that the target does
        not know are taken in; others wait as successors. `nodes` names the node of each rank.
        """
        if self.target is None:
            return False
        known = {rank: count for rank, count in slots.items() if rank in self._made_for}
        fresh = sorted(rank for rank in slots if rank not in self._made_for)
        leavers = sorted(rank for rank in self._made_for if rank not in slots)
        taken = fresh[: max(newcomers, 0)]
        wanted = {**known, **{rank: slots[rank] for rank in taken}}
        before, self._made_for = self._made_for, wanted or self._made_for
        if not wanted or (wanted.keys() == before.keys() and self._fits(wanted)) or wanted == before:
            return False
        try:
            placement = self._resized(wanted, nodes, dict(zip(leavers, taken, strict=False)))
        except ValueError as error:
            self.problem = str(error)
            logger.error("the placement cannot follow the shards: %s", error)
            return False
        parts = [f"+{rank}" for rank in taken] + [f"-{rank}" for rank in leavers]
        self.problem = ""
        self.target = replace(
            self.target,
            version=self.target.version + 1,
            origin=f"shards {' '.join(parts) or 'resized'}",
            placement=placement,
        )
        logger.info("target %d: %s", self.target.version, self.target.origin)
        return True

    def speeds(self, num_ranks: int) -> tuple[float, ...] | None:
        """The speeds of the target's ranks, 1 for ranks that it lacks; None if all are equal."""
        if self.target is None or self.target.placement.speeds is None:
            return None
        known = self.target.placement.speeds[:num_ranks]
        return (*known, *(1.0,) * (num_ranks - len(known)))

    def _fits(self, slots: Mapping[int, int]) -> bool:
        """Whether each rank has the slots that the target's row needs."""
        assert self.target is not None
        placement = self.target.placement
        map_LRs = placement.physical_to_logical_map.reshape(placement.num_layers, placement.num_ranks, -1)
        used_R = (map_LRs >= 0).sum(2).max(0)
        return all(rank < len(used_R) and used_R[rank] <= count for rank, count in slots.items())

    def _resized(self, slots: Mapping[int, int], nodes: Mapping[int, str], successor_of: dict[int, int]) -> Placement:
        assert self.target is not None
        current = self.target.placement
        num_ranks = max(max(slots) + 1, current.num_ranks)
        num_nodes, node_of_rank = numbered_nodes(nodes, num_ranks)
        placement = resize(
            current,
            slots_R=[slots.get(rank, 0) for rank in range(num_ranks)],
            usable_R=[rank in slots for rank in range(num_ranks)],
            load_LE=self.target.load_LE,
            min_replicas=min(self.limits.min_replicas, len(slots)),
            fewer_replicas=True,  # every expert once comes before some of them twice
            spare_slots=self.limits.spare_slots,
            nodes=node_of_rank,
            num_nodes=num_nodes,
            successor_of=successor_of,
            protect_LE=protected_experts(current, self.target.load_LE, self.limits.protect),
            speed_R=self.speeds(num_ranks),
        )
        return without_last_ranks(placement, max(slots) + 1)


def without_last_ranks(placement: Placement, num_ranks: int) -> Placement:
    """The first `num_ranks` ranks; the others must be empty."""
    map_LRs = placement.physical_to_logical_map.reshape(placement.num_layers, placement.num_ranks, -1)
    nodes = None if placement.nodes is None else placement.nodes[:num_ranks]
    return Placement(
        num_ranks,
        placement.num_nodes if nodes is not None else 1,
        placement.num_experts,
        map_LRs[:, :num_ranks].reshape(placement.num_layers, -1),
        nodes=nodes,
        speeds=None if placement.speeds is None else placement.speeds[:num_ranks],
    )


def numbered_nodes(nodes: Mapping[int, str], num_ranks: int) -> tuple[int, tuple[int, ...]]:
    """(number of nodes, the node of each rank), numbered in the order of their first ranks; 0 where no shard is."""
    number: dict[str, int] = {}
    found = tuple(number.setdefault(nodes[rank], len(number)) if rank in nodes else 0 for rank in range(num_ranks))
    return max(len(number), 1), found
