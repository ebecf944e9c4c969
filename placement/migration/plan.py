"""From one placement to another in rounds of copies, with every expert served at every moment.

L layers, E experts, R ranks, s slots of a rank in the frame of the migration, S = R * s.

In a round, retired slots first leave the map that routers dispatch by. Once the last router has moved on, the round's
copies are written; then the map with the new slots, and without the dropped ones, is published. So a slot is written
only while nobody reads it, and every source is live and unchanged during the round: copies of one round may run in any
order or in parallel. The migration may stop for good between any two rounds.

This requires, in each layer:

- A slot is retired only if its expert has another live slot in the map that remains. Routers serve it from there.
- Where every slot that must make room holds the last replica of its expert (a cycle), one of those experts is parked:
  it is first copied to a spare slot. That is an empty slot, else one whose expert does not belong there and is live
  elsewhere, else a replica of an expert that has another one, which is restored afterwards.
- So there must be one slot more than there are experts. If as many slots as experts are all full, nothing can move
  without leaving an expert unserved, whatever the source. `plan_migration` then refuses and says that one spare slot on
  some shard is enough; one on every shard (`scratch_slots=1`: shards of `slots_per_rank + 1` slots) lets shards change
  in parallel, without parking.

A target says which experts a rank holds. Which of its slots they take is decided here, so experts that stay on a rank
are not copied. Only experts without a live slot, on ranks that were lost, come from the checkpoint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from placement.migration.layer import LayerMigration, MigrationError
from placement.placement import EMPTY, Placement, check_same_model
from placement.topology import Topology

UNBOUNDED = 1 << 62
Nearness = Literal["rank", "node", "rack", "cluster", "checkpoint"]


@dataclass(frozen=True)
class Copy:
    """One expert's weights into one slot; `source_rank` and `source_slot` are -1 for the checkpoint.

    `slot` and `source_slot` are local to their rank. `nearness` is the widest boundary the copy crosses.
    """

    layer: int
    expert: int
    source_rank: int
    source_slot: int
    rank: int
    slot: int
    size_bytes: int
    nearness: Nearness


@dataclass(frozen=True)
class Round:
    """Slots as (layer, rank, local slot). `retired` leave the map before the copies, `dropped` after them."""

    retired: tuple[tuple[int, int, int], ...]
    copies: tuple[Copy, ...]
    dropped: tuple[tuple[int, int, int], ...]

    @property
    def size_bytes(self) -> int:
        return sum(copy.size_bytes for copy in self.copies)


@dataclass(frozen=True, eq=False)
class MigrationPlan:
    """The rounds, and the maps before, during and after each of them.

    `start_LRs` int32 [L, R, s]: what is live before the first round, with lost ranks empty. It has as many ranks and
    slots as the larger of the two placements, or as the shards have room for.
    """

    num_nodes: int
    num_experts: int
    start_LRs: np.ndarray
    rounds: tuple[Round, ...]
    _maps: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def num_copies(self) -> int:
        return sum(len(each.copies) for each in self.rounds)

    @property
    def size_bytes(self) -> int:
        return sum(each.size_bytes for each in self.rounds)

    def bytes_by_nearness(self) -> dict[str, int]:
        """Bytes copied, by the widest boundary they cross."""
        total: Counter[str] = Counter()
        for each in self.rounds:
            for copy in each.copies:
                total[copy.nearness] += copy.size_bytes
        return dict(total)

    def map_after(self, num_rounds: int) -> np.ndarray:
        """int32 [L, S]: what is live after so many rounds, 0 for the start. Raises ValueError if out of range."""
        if not 0 <= num_rounds <= len(self.rounds):
            raise ValueError(f"{num_rounds} rounds are asked for, the plan has {len(self.rounds)}")
        if num_rounds not in self._maps:
            done = max((n for n in self._maps if n < num_rounds), default=0)
            map_LRs = self._maps[done].reshape(self.start_LRs.shape).copy() if done else self.start_LRs.copy()
            for each in self.rounds[done:num_rounds]:
                for slot in each.retired + each.dropped:
                    map_LRs[slot] = EMPTY
                for copy in each.copies:
                    map_LRs[copy.layer, copy.rank, copy.slot] = copy.expert
            self._maps[num_rounds] = map_LRs.reshape(len(map_LRs), -1)
        return self._maps[num_rounds].copy()

    def map_during(self, round_index: int) -> np.ndarray:
        """int32 [L, S]: what routers must dispatch by while the copies of a round, counted from 0, are written."""
        map_LRs = self.map_after(round_index).reshape(self.start_LRs.shape)
        for slot in self.rounds[round_index].retired:
            map_LRs[slot] = EMPTY
        return map_LRs.reshape(len(map_LRs), -1)

    def placement_after(self, num_rounds: int) -> Placement:
        """The placement to publish after so many rounds, and to keep if the migration stops there.

        Raises ValueError while an expert that lost all its ranks is not restored.
        """
        return Placement(self.start_LRs.shape[1], self.num_nodes, self.num_experts, self.map_after(num_rounds))

    @property
    def final(self) -> Placement:
        """The target, its experts in the slots they were given."""
        return self.placement_after(len(self.rounds))


def plan_migration(
    current: Placement,
    target: Placement,
    *,
    expert_bytes: int | Sequence[int],
    round_bytes: int | None = None,
    room: int | Sequence[int] | None = None,
    scratch_slots: int = 0,
    lost_ranks: Collection[int] = (),
    topology: Topology | None = None,
    layer_order: Sequence[int] | None = None,
) -> MigrationPlan:
    """Plan the copies that turn `current` into `target`.

    Args:
        current, target: of the same model. Ranks may be added or removed at the end, whole nodes if there are several;
            ranks keep their numbers. The target leaves a draining rank empty.
        expert_bytes: weights of one expert, one number for all layers or one for each.
        round_bytes: most bytes copied in one round; None: as many as the slots allow.
        room: slots of a layer that ranks have memory for, one number for all ranks or one for each; None: as in the
            larger placement. See `Topology.slots_per_rank`.
        scratch_slots: with `room` None, further slots that every rank has memory for. They are empty before and after,
            and let full shards exchange experts. 1 is enough for any migration.
        lost_ranks: ranks of `current` whose slots are gone; the target must leave them empty.
        topology: which ranks share a node or a rack; None: nodes as in the placements, one rack.
        layer_order: which layers go first. As far as its slots allow, a layer is finished before the budget of a round
            goes to later ones, so a migration that stops leaves few layers half way.

    Experts without a live slot come first. Raises MigrationError, a ValueError of one line that names layer or rank,
    if the placements do not fit together or no legal order exists.
    """
    if scratch_slots < 0 or (scratch_slots and room is not None):
        raise MigrationError(f"scratch_slots is {scratch_slots}, expected 0 or more, and 0 where room is given")
    if scratch_slots:
        room = max(current.slots_per_rank, target.slots_per_rank) + scratch_slots
    num_ranks, num_nodes, room_R = _frame(current, target, room)
    if topology is not None and topology.num_ranks != num_ranks:
        raise MigrationError(f"the topology has {topology.num_ranks} ranks, the migration {num_ranks}")
    sizes_L = np.broadcast_to(np.asarray(expert_bytes, np.int64), (current.num_layers,))
    if sizes_L.min() < 1:
        raise MigrationError(f"expert_bytes is {int(sizes_L.min())}, expected at least 1")
    if round_bytes is not None and round_bytes < sizes_L.max():
        raise MigrationError(f"round_bytes is {round_bytes}, less than one expert's {int(sizes_L.max())}")
    order = list(range(current.num_layers)) if layer_order is None else list(layer_order)
    if sorted(order) != list(range(current.num_layers)):
        raise MigrationError(f"layer_order must name each of {current.num_layers} layers once, got {order}")
    width = int(room_R.max())
    start_LRs = _in_frame(current, num_ranks, width)
    target_LRs = _in_frame(target, num_ranks, width)
    for rank in lost_ranks:
        if not 0 <= rank < num_ranks:
            raise MigrationError(f"lost rank {rank} is out of range, expected 0 to {num_ranks - 1}")
        if (target_LRs[:, rank] != EMPTY).any():
            raise MigrationError(f"the target puts experts on rank {rank}, which is lost")
        start_LRs[:, rank] = EMPTY
    room_R = np.where(np.isin(np.arange(num_ranks), list(lost_ranks)), 0, room_R)
    distance_RR = _distances(num_ranks, num_nodes, topology)
    layers = [
        LayerMigration(layer, start_LRs[layer], target_LRs[layer], room_R, current.num_experts, distance_RR)
        for layer in order
    ]

    rounds: list[Round] = []
    while any(not layer.done for layer in layers):
        left = UNBOUNDED if round_bytes is None else round_bytes
        open_layers = [layer for layer in layers if not layer.done]
        # Unserved experts come before all else.
        open_layers.sort(key=lambda layer: not layer.has_orphans)
        retired, copies, dropped = [], [], []
        for layer in open_layers:
            size = int(sizes_L[layer.index])
            step = layer.advance(left // size)
            retired += [(layer.index, *slot) for slot in step.retired]
            dropped += [(layer.index, *slot) for slot in step.dropped]
            for move in step.moves:
                nearness: Nearness = "checkpoint"
                if move.source_rank >= 0:
                    nearness = _NEARNESS[int(distance_RR[move.source_rank, move.rank])]
                copies.append(
                    Copy(layer.index, move.expert, move.source_rank, move.source_slot, move.rank, move.slot, size,
                         nearness)
                )  # fmt: skip
            left -= size * len(step.moves)
        rounds.append(Round(tuple(retired), tuple(copies), tuple(dropped)))
    return MigrationPlan(num_nodes, current.num_experts, start_LRs, tuple(rounds))


_NEARNESS: tuple[Nearness, ...] = ("rank", "node", "rack", "cluster")


def _frame(current: Placement, target: Placement, room: int | Sequence[int] | None) -> tuple[int, int, np.ndarray]:
    """Ranks, nodes, and int64 [R] slots of each rank that both placements fit into."""
    try:
        check_same_model("the current placement", current, "the target", target)
    except ValueError as error:
        raise MigrationError(str(error)) from None
    if (
        max(current.num_nodes, target.num_nodes) > 1
        and current.num_ranks * target.num_nodes != target.num_ranks * current.num_nodes
    ):
        raise MigrationError(
            f"the current placement has {current.num_ranks / current.num_nodes:g} ranks a node, the target "
            f"{target.num_ranks / target.num_nodes:g}: "
            "only whole nodes can be added or taken away"
        )
    num_ranks = max(current.num_ranks, target.num_ranks)
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
    return num_ranks, max(current.num_nodes, target.num_nodes), room_R


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


def _distances(num_ranks: int, num_nodes: int, topology: Topology | None) -> np.ndarray:
    """int8 [R, R]: 0 same rank, 1 same node, 2 same rack, 3 farther."""
    if topology is not None:
        return topology.distance_RR
    node_R = np.arange(num_ranks) // (num_ranks // num_nodes)
    distance_RR = np.where(node_R[:, None] == node_R[None, :], 1, 2).astype(np.int8)
    np.fill_diagonal(distance_RR, 0)
    return distance_RR


__all__ = ["Copy", "MigrationError", "MigrationPlan", "Round", "plan_migration"]
