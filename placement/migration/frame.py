"""The ranks, nodes and slots that a migration takes place in: those of both placements.

L layers, R ranks, s slots of a rank.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from placement.migration.layer import MigrationError
from placement.placement import EMPTY, Placement, check_same_model
from placement.topology import Topology


@dataclass(frozen=True, eq=False)
class Frame:
    """`start_LRs`, `target_LRs` int32 [L, R, s], lost ranks empty; `room_R` int64 slots; `distance_RR` int8."""

    start_LRs: np.ndarray
    target_LRs: np.ndarray
    room_R: np.ndarray
    nodes: tuple[int, ...]
    num_nodes: int
    distance_RR: np.ndarray


def common_frame(
    current: Placement,
    target: Placement,
    room: int | Sequence[int] | None,
    lost_ranks: Collection[int],
    topology: Topology | None,
) -> Frame:
    """The frame both placements fit into. Raises MigrationError, by name, if they do not fit together."""
    try:
        check_same_model("the current placement", current, "the target", target)
    except ValueError as error:
        raise MigrationError(str(error)) from None
    # What nobody holds may stay so for a while: its shard is awaited.
    lacking = np.argwhere((target.logical_replica_count == 0) & (current.logical_replica_count > 0))
    if lacking.size:
        raise MigrationError(f"layer {lacking[0][0]}: the target has no slot for expert {lacking[0][1]}")
    num_ranks = max(current.num_ranks, target.num_ranks)
    room_R = _room(current, target, room, num_ranks)
    width = max(int(room_R.max()), 1)
    start_LRs = _in_frame(current, num_ranks, width)
    target_LRs = _in_frame(target, num_ranks, width)
    for rank in lost_ranks:
        if not 0 <= rank < num_ranks:
            raise MigrationError(f"lost rank {rank} is out of range, expected 0 to {num_ranks - 1}")
        if (target_LRs[:, rank] != EMPTY).any():
            raise MigrationError(f"the target puts experts on rank {rank}, which is lost")
        start_LRs[:, rank] = EMPTY
    room_R = np.where(np.isin(np.arange(num_ranks), list(lost_ranks)), 0, room_R)
    nodes = _nodes(current, target, start_LRs, target_LRs)
    if topology is not None and topology.num_ranks != num_ranks:
        raise MigrationError(f"the topology has {topology.num_ranks} ranks, the migration {num_ranks}")
    num_nodes = max(current.num_nodes, target.num_nodes)
    distance_RR = topology.distance_RR if topology is not None else _distances(np.array(nodes))
    return Frame(start_LRs, target_LRs, room_R, nodes, num_nodes, distance_RR)


def _room(current: Placement, target: Placement, room: int | Sequence[int] | None, num_ranks: int) -> np.ndarray:
    """int64 [R]: slots of each rank, checked to hold what both placements put there."""
    used_R = np.zeros(num_ranks, np.int64)
    for placement in (current, target):
        map_LRs = _in_frame(placement, num_ranks, placement.slots_per_rank)
        used_R = np.maximum(used_R, (map_LRs != EMPTY).sum(2).max(0))
    if room is None:
        room_R = np.full(num_ranks, max(current.slots_per_rank, target.slots_per_rank), np.int64)
    else:
        given = np.asarray(room, np.int64)
        if given.shape not in ((), (num_ranks,)):
            raise MigrationError(f"room is given for {given.size} ranks, there are {num_ranks}")
        room_R = np.broadcast_to(given, (num_ranks,)).copy()
    short = np.flatnonzero(used_R > room_R)
    if short.size:
        raise MigrationError(f"rank {short[0]} has room for {room_R[short[0]]} slots, {used_R[short[0]]} are used")
    # A slot in use needs room where it is, even if empty slots come before it.
    last_R = np.zeros(num_ranks, np.int64)
    map_LRs = _in_frame(current, num_ranks, current.slots_per_rank)
    for slot in range(current.slots_per_rank):
        last_R[(map_LRs[:, :, slot] != EMPTY).any(0)] = slot + 1
    beyond = np.flatnonzero(last_R > room_R)
    if beyond.size:
        raise MigrationError(
            f"rank {beyond[0]} has room for {room_R[beyond[0]]} slots, its slot {last_R[beyond[0]] - 1} is used"
        )
    return room_R


def _in_frame(placement: Placement, num_ranks: int, width: int) -> np.ndarray:
    """int32 [L, R, s] of a placement; experts beyond `width` move to the front of their rank."""
    given = placement.physical_to_logical_map.reshape(placement.num_layers, placement.num_ranks, -1)
    frame = np.full((placement.num_layers, num_ranks, width), EMPTY, np.int32)
    if given.shape[2] > width:
        # Empty slots last; the order of a rank's experts is kept.
        order = np.argsort(given == EMPTY, axis=2, kind="stable")
        given = np.take_along_axis(given, order, axis=2)[:, :, :width]
    frame[:, : placement.num_ranks, : given.shape[2]] = given
    return frame


def _nodes(current: Placement, target: Placement, start_LRs: np.ndarray, target_LRs: np.ndarray) -> tuple[int, ...]:
    """The node of each rank. A rank that only one placement uses is where that one says."""
    before, after = current.node_of_rank_R.tolist(), target.node_of_rank_R.tolist()
    held_R, wanted_R = ((map_LRs != EMPTY).any((0, 2)) for map_LRs in (start_LRs, target_LRs))
    nodes = []
    for rank in range(start_LRs.shape[1]):
        if rank < min(len(before), len(after)):
            if before[rank] != after[rank] and held_R[rank] and wanted_R[rank]:
                raise MigrationError(
                    f"rank {rank} is on node {before[rank]} in the current placement, on node {after[rank]} in the "
                    "target: a shard that moves to another node is a lost rank and a new one"
                )
            nodes.append(before[rank] if held_R[rank] else after[rank])
        else:
            nodes.append((before if rank < len(before) else after)[rank])
    return tuple(nodes)


def _distances(node_R: np.ndarray) -> np.ndarray:
    """int8 [R, R]: 0 same rank, 1 same node, 2 another node."""
    distance_RR = np.where(node_R[:, None] == node_R[None, :], 1, 2).astype(np.int8)
    np.fill_diagonal(distance_RR, 0)
    return distance_RR
